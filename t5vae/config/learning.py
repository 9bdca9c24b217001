"""The sections that say what is learned: the model, its objective, its optimiser."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model

from t5vae.common.kinds import BOTTLENECKS, OPTIMISERS, TERMS, find
from t5vae.common.section import Fraction, OneOf, Place, Section
from t5vae.objective import Term

Beta = Annotated[float, Field(ge=0, lt=1)]


class T5(Section):
    """The T5 inside, in transformers' names; null takes `model.base`'s, or T5-small's without."""

    d_model: int | None = Field(default=None, ge=1)
    """Width of the states."""
    d_kv: int | None = Field(default=None, ge=1)
    """Width of one attention head."""
    d_ff: int | None = Field(default=None, ge=1)
    """Width inside the feed-forward layers."""
    num_layers: int | None = Field(default=None, ge=1)
    """Layers of the encoder, and of the decoder where that is not given."""
    num_decoder_layers: int | None = Field(default=None, ge=1)
    """Null takes num_layers, or the base's."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads of a layer."""
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] | None = None
    """Activation of the feed-forward layers, gated or not."""
    dropout_rate: Fraction | None = None
    """Null takes the base's, or 0 without."""


class Model(Section):
    base: Place | None = None
    """A pretrained T5, T5 v1.1, Flan-T5, ByT5, mT5 or UMT5 to start from: a folder, or a Hugging
    Face name. Its tokenizer must be the shards'. Null for random weights."""
    t5: T5 = T5()
    vocab_size: int | None = Field(default=None, ge=4)
    """Null takes the shards' tokenizer's."""
    sequence_length: int | None = Field(default=None, ge=1)
    """T, tokens of the longest sequence, end token included; null takes the shards' max_length."""
    latent_size: int = Field(default=256, ge=1)
    """D, coordinates of the latent code."""
    bottleneck: Annotated[str, OneOf(BOTTLENECKS)] = "flatten"
    """Between the encoder's states and the code: "flatten" takes all T tokens through one
    linear layer, "attention" pools them with learned queries."""
    token_size: int = Field(default=64, ge=1)
    """Width of a token inside "flatten"."""
    expansion_rank: int | None = Field(default=None, ge=1)
    """Rank per token of the map from code to memory in "flatten"; null for full rank."""
    memory_length: int = Field(default=8, ge=1)
    """M, tokens the decoder attends to under "attention"; "flatten" makes T of them."""
    squash: Literal["tanh"] | None = None
    """Bounds every coordinate u to s tanh(u / s), s = squash_scale."""
    squash_scale: float = Field(default=1.0, gt=0)
    """s, the bound of a squashed coordinate."""
    normalize: bool = True
    """Scale every code to norm sqrt(D), so that the encoder cannot grow codes out of the noise."""
    mask_padding: bool = True
    """Hide pads from the encoder and the bottleneck."""
    posterior: Literal["gaussian"] | None = None
    """What a code is drawn from in training: "gaussian", N(mean, diag(variance)) of the encoder's
    own, as in a VAE; its mean is the code elsewhere. Null: a sequence has one code."""
    gradient_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass, to save memory."""
    compile: bool = False
    """torch.compile the layers of the encoder and the decoder."""
    fused_cross_entropy: bool | None = None
    """Never store all logits, by liger-kernel on CUDA; null does so where that is installed."""


class _Objective(Section):
    """Beside reconstruction it has the terms of `TERMS`, a section each."""

    reconstruction: Literal["mean", "sum"] = "mean"
    """Cross-entropy per real token of the global batch, or its sum, as the original had it."""
    latent_noise: float = Field(default=1.0, ge=0)
    """Standard deviation of the Gaussian added to the code in training."""
    input_mask: Fraction = 0.1
    """Share of encoder input tokens replaced by the unknown token in training."""
    word_dropout: Fraction = 0.0
    """The same for the decoder's input tokens."""

    @property
    def terms(self) -> dict[str, Term]:
        """All terms, by name."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def computed(self) -> dict[str, Term]:
        """Those that are computed and logged."""
        return {name: term for name, term in self.terms.items() if term.is_on}

    @property
    def scale(self) -> float:
        """The standard deviation of the prior."""
        scales = (term.scale for term in self.terms.values())
        return next((scale for scale in scales if scale is not None), 1.0)

    def weights(self, step: int, steps: int) -> dict[str, float]:
        """Of each term at a step, counted from 0, of a run of `steps`."""
        return {name: term.weight_at(step, steps) for name, term in self.terms.items()}


if TYPE_CHECKING:
    Objective = _Objective
else:
    Objective = create_model(
        "Objective",
        __base__=_Objective,
        __module__=__name__,
        **{name: (find(TERMS, name), find(TERMS, name)()) for name in TERMS},
    )


def __getattr__(name: str) -> type[Term]:
    """A term by the name of its class: jobs that 0.1 queued look for it here."""
    found = {kind.__name__: kind for kind in (find(TERMS, name) for name in TERMS)}
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


class Optim(Section):
    name: Annotated[str, OneOf(OPTIMISERS)] = "muon"
    """adamw or lion for all weights, or muon for the matrices between embedding and logits and
    adamw for the rest."""
    lr: float = Field(default=2e-3, gt=0)
    """AdamW's or Lion's learning rate."""
    muon_lr: float = Field(default=0.012, gt=0)
    """Muon's: the spectral norm of an update."""
    momentum: Fraction = 0.95
    """Muon's."""
    muon_precision: Literal["fp32", "bf16"] | None = None
    """Of Muon's iteration on a CPU; null: bf16 where square products are 1.2 times as fast in it,
    timed at the start."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of AdamW's or Lion's first and second moments, a step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to norms and biases."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape of the learning rate after the warm-up."""
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    final_lr: Fraction = 0.0
    """Share of `lr` at the end of the schedule, just past the last step."""
    gradient_clipping: float | None = Field(default=None, ge=0)
    """Largest norm of the gradient, 0 for no clipping; null means 1, and 0 with muon."""
