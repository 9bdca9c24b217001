"""The configuration of a T5-VAE: a T5 configuration plus the shape of its bottleneck."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from t5vae.common.kinds import BOTTLENECKS

ARCHITECTURES = ("t5", "mt5", "umt5")
SHAPE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "initializer_factor",
    "feed_forward_proj",
)
OF_T5 = {"model_type", "pad_token_id", "eos_token_id", "decoder_start_token_id", *SHAPE}
DEEPEST = 10_000
LONGEST = 2**16 - 1
"""Tokens of a sequence that shards can hold."""


class T5VAEConfig(PreTrainedConfig):
    """Everything needed to build a :class:`~t5vae.model.T5VAE`.

    Args:
        t5: the configuration of the T5 inside, as a dictionary of the names in `OF_T5` with its
            `model_type`: "t5" (default; also T5 v1.1, Flan-T5 and ByT5), "mt5" or "umt5".
        tie_word_embeddings: let the output layer share the embedding's weights and scale its
            input by d_model^-0.5, as in T5. False gives it weights of its own and no scale, as in
            T5 v1.1, Flan-T5, ByT5, mT5 and UMT5.
        latent_size: D, the number of coordinates of the latent code.
        sequence_length: T, the longest sequence in tokens, end token included.
        bottleneck: a name in `BOTTLENECKS`, "flatten" or "attention".
        token_size: width to which "flatten" shrinks each token before flattening.
        expansion_rank: rank per token of the linear map from the code to the decoder's memory in
            "flatten"; None for a full-rank map. The original T5-VAE used 10.
        memory_length: M, tokens of memory the decoder attends to under "attention"; "flatten"
            always expands to `sequence_length`.
        squash: None, or "tanh" to bound each latent coordinate u to s tanh(u / s).
        squash_scale: s. At 1, tanh's own bound, codes cannot match N(0, I); at 3 and more they can.
        normalize: scale every code to norm sqrt(D), where nearly all of N(0, I) lies, so that the
            encoder cannot evade latent noise by growing its codes.
        mask_padding: hide pad positions from the encoder and the bottleneck, so that the code does
            not depend on how far a batch was padded. False reproduces the original, which always
            pads to `sequence_length` and lets the encoder see it.
        posterior: None, or "gaussian": in training a code is drawn from a normal distribution whose
            mean and log-variance the bottleneck gives; elsewhere it is the mean.
        unknown_token_id: stands in for the tokens that training drops.

    Raises:
        ValueError: for an unknown `bottleneck`, `squash`, `posterior` or `model_type`, sizes below
            one, longer sequences than shards hold, or a posterior of codes that are squashed or
            normalized.
    """

    model_type = "t5vae"

    t5: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    latent_size: int = 64
    sequence_length: int = 20
    bottleneck: str = "attention"
    token_size: int = 64
    expansion_rank: int | None = None
    memory_length: int = 8
    squash: str | None = None
    squash_scale: float = 1.0
    normalize: bool = False
    mask_padding: bool = True
    posterior: str | None = None
    unknown_token_id: int = 2
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.t5 = {"model_type": "t5", **(self.t5 or {})}
        choices = {
            "bottleneck": (self.bottleneck, tuple(BOTTLENECKS)),
            "squash": (self.squash, (None, "tanh")),
            "posterior": (self.posterior, (None, "gaussian")),
            "the model_type of t5": (self.t5["model_type"], ARCHITECTURES),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}")
        for name in ("latent_size", "sequence_length", "token_size", "memory_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_layers", "num_decoder_layers"):
            if (self.t5.get(name) or 0) > DEEPEST:
                raise ValueError(f"{name} is {self.t5[name]}; {DEEPEST:,} is the most")
        if self.sequence_length > LONGEST:
            raise ValueError(f"sequence_length is {self.sequence_length}; {LONGEST:,} is the most")
        if self.expansion_rank is not None and self.expansion_rank < 1:
            raise ValueError(f"expansion_rank is {self.expansion_rank}; it must be at least 1")
        if self.squash_scale <= 0:
            raise ValueError(f"squash_scale is {self.squash_scale}; it must be above 0")
        if self.posterior and (self.squash or self.normalize):
            raise ValueError("a posterior goes with neither squash nor normalize")
        super().__post_init__(**kwargs)

    @property
    def encoded_size(self) -> int:
        """Numbers that the bottleneck makes of a sequence: a code, or a mean and log-variance."""
        return self.latent_size * (2 if self.posterior else 1)

    @property
    def t5_config(self) -> PreTrainedConfig:
        """The configuration object of the T5 inside; of `t5`, only what is in `OF_T5` counts."""
        t5 = self.t5 or {}
        return AutoConfig.for_model(**{name: t5[name] for name in OF_T5 & t5.keys()})

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None):
        """The T5's configuration: it describes the layers that `generate` caches."""
        return self.t5_config


AutoConfig.register("t5vae", T5VAEConfig)
