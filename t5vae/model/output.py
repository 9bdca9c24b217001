"""What a T5VAE returns."""

from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

# What this transformers calls a decoder's cache: 5.24 gave it a new name.
CACHE = (
    "cache"
    if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__
    else "past_key_values"
)


@dataclass
class T5VAEOutput(ModelOutput):
    """What a T5VAE returns.

    Attributes:
        loss: mean cross-entropy per real token in nats, where there are labels.
        logits: [B, T, V], in mode "decode".
        latent: [B, D], the code that was encoded or given, without noise; with a posterior and
            `regularisers` the one that was drawn.
        nll: float32 [B], summed cross-entropy of each row in nats, where there are labels; the
            fused cross-entropy knows `loss` alone.
        mean, log_variance: float32 [B, D], of the posterior, where there is one and it was encoded.
        cache, or past_key_values before transformers 5.24: the decoder's cache.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_last_hidden_state,
        encoder_hidden_states, encoder_attentions: as in transformers' T5, where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    latent: Tensor | None = None
    nll: Tensor | None = None
    mean: Tensor | None = None
    log_variance: Tensor | None = None
    if CACHE == "cache":
        cache: Any = None
    else:
        past_key_values: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


def losses(nll_N: Tensor, places_N: Tensor, shape: Size) -> T5VAEOutput:
    """The mean cross-entropy of real tokens, and the sum of each row.

    Args:
        nll_N: of each, float32 [N].
        places_N: where they lie in the flattened batch.
        shape: of the batch, [B, T].
    """
    nll_P = nll_N.new_zeros(shape.numel()).index_copy(0, places_N, nll_N)
    nll_B = nll_P.view(shape).sum(1)
    return T5VAEOutput(loss=nll_B.sum() / max(1, len(nll_N)), nll=nll_B)
