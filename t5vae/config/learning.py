"""The sections that say what is learned: the model, its objective, its optimiser."""

from typing import Annotated, Literal

from pydantic import Field

from t5vae.common.section import Fraction, Section

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
    base: str | None = None
    """A pretrained T5, T5 v1.1, Flan-T5, ByT5, mT5 or UMT5 to start from: a folder, or a Hugging
    Face name. Its tokenizer must be the shards'. Null for random weights."""
    t5: T5 = T5()
    vocab_size: int | None = Field(default=None, ge=4)
    """Null takes the shards' tokenizer's."""
    sequence_length: int | None = Field(default=None, ge=1)
    """T, tokens of the longest sequence, end token included; null takes the shards' max_length."""
    latent_size: int = Field(default=256, ge=1)
    """D, coordinates of the latent code."""
    bottleneck: Literal["flatten", "attention"] = "flatten"
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
    gradient_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass, to save memory."""
    compile: bool = False
    """torch.compile the layers of the encoder and the decoder."""
    fused_cross_entropy: bool | None = None
    """Never store all logits, by liger-kernel on CUDA; null does so where that is installed."""


class MMD(Section):
    kernel: Literal["rbf", "multi_rbf", "imq", "legacy"] = "imq"
    """rbf; multi_rbf, a mean of five octaves of it; imq, inverse multiquadrics of seven scales;
    legacy, the original's rbf of bandwidth D^2."""
    prior: Literal["normal", "uniform", "sampled"] = "normal"
    """N(0, sigma^2 I) or uniform on (-sigma, sigma)^D, in closed form; or draws of the former."""
    estimator: Literal["u", "v"] = "u"
    """u is unbiased; v, the original's, counts each code against itself and shrinks codes."""
    sigma: float = Field(default=1.0, gt=0)
    """Standard deviation of the prior, half its width where that is uniform."""
    weight: float = Field(default=30.0, ge=0)
    """Of MMD^2 in the loss, against nats a token (or all nats, under reconstruction sum)."""
    schedule: Literal["constant", "linear", "sigmoid"] = "constant"
    """weight(step): constant; linear, from 0 over `warmup`; sigmoid(slope * step - offset)."""
    warmup: Fraction = 0.1
    """Share of the steps over which "linear" rises."""
    slope: float = 0.0025
    """Of the sigmoid, per step."""
    offset: float = 6.25
    """Of the sigmoid."""
    implementation: Literal["blocked", "triton"] = "blocked"
    """triton: fused, on CUDA devices alone."""


class EppsPulley(Section):
    weight: float = Field(default=0.0, ge=0)
    """Of the sliced Epps-Pulley statistic in the loss; 0 for none."""
    slices: int = Field(default=256, ge=0)
    """Random directions, new ones in every step."""
    axes: bool = True
    """The coordinate axes too."""


class Objective(Section):
    mmd: MMD = MMD()
    epps_pulley: EppsPulley = EppsPulley()
    """A second regulariser, which sees the axes and tails that MMD does not."""
    reconstruction: Literal["mean", "sum"] = "mean"
    """Cross-entropy per real token of the global batch, or its sum, as the original had it."""
    latent_noise: float = Field(default=1.0, ge=0)
    """Standard deviation of the Gaussian added to the code in training."""
    input_mask: Fraction = 0.1
    """Share of encoder input tokens replaced by the unknown token in training."""
    word_dropout: Fraction = 0.0
    """The same for the decoder's input tokens."""


class Optim(Section):
    name: Literal["adamw", "lion", "muon"] = "muon"
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
