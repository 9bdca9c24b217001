"""Floating-point operations of layers: their matrix products, a multiply-add as two."""

from transformers import PreTrainedConfig


def attention(width: int, heads: int, queries: int, keys: int) -> int:
    """Projections, scores and values of attention.

    Args:
        width: of the states.
        heads: width of all heads together.
        queries, keys: tokens.
    """
    return 4 * heads * (width * (queries + keys) + queries * keys)


def feed_forward(t5: PreTrainedConfig, tokens: int) -> int:
    """A T5's feed-forward layer, gated or not."""
    return (6 if t5.is_gated_act else 4) * t5.d_model * t5.d_ff * tokens
