"""Learn smooth latent spaces of sequences.

`import t5vae` alone makes transformers' Auto classes know T5VAE, and stays quick: the model is
imported when the first of its configurations is made.
"""

from types import ModuleType
from typing import Any

from wrapt import when_imported

from t5vae.common import renamed

renamed.install()


@when_imported("transformers.models.auto.configuration_auto")
def _register(auto: ModuleType) -> None:
    from transformers import PreTrainedConfig

    class Known(PreTrainedConfig):
        """Stands in for T5VAEConfig, which takes its place as soon as it is wanted."""

        model_type = "t5vae"

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from t5vae.model import T5VAEConfig

            return T5VAEConfig(*args, **kwargs)

    auto.AutoConfig.register(Known.model_type, Known)
