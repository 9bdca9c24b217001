"""Learn smooth latent spaces of sequences.

`import t5vae` alone makes transformers' Auto classes know T5VAE, and stays quick: the model is
imported when transformers' are.
"""

from types import ModuleType

from wrapt import when_imported

from t5vae.common import renamed

renamed.install()


@when_imported("transformers.models.auto.modeling_auto")
def _register(module: ModuleType) -> None:
    import t5vae.model  # noqa: F401
