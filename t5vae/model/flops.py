"""Floating-point operations and parameters of a T5VAE, from its configuration.

Only the model's matrix products count, a multiply-add as two operations; norms, softmax, biases,
activations, embedding lookups, the objective's regulariser and the optimizer do not. The peak to
compare with is that of matrix products.

Model FLOPs utilisation (MFU) is the operations that the model needs over those that the device
could have done: `training_flops(batch) / (seconds * peak)`, or `flops_per_token * tokens per second
/ peak`. The conventions are those of Chowdhery et al., PaLM, arXiv 2204.02311, section 4.1 and
appendix B: the backward pass is two products for each of the forward pass, what gradient
checkpointing computes again is not counted, and causal attention counts as full attention. They
take 6 operations a parameter and token and 12 L H Q T for attention (L layers, H heads of width Q,
T tokens). Here each product is counted by its own shape instead, since the bottleneck sees
sequences, cross-attention the memory, and the output layer real tokens alone. Kaplan et al., arXiv
2001.08361, table 1, have half PaLM's figure for attention and leave the output layer out of their
total.
"""

from torch import Tensor

from t5vae.common.kinds import BOTTLENECKS, find
from t5vae.model.configuration import T5VAEConfig
from t5vae.model.modeling import T5VAE
from t5vae.model.operations import attention, feed_forward


def training_flops(
    config: T5VAEConfig,
    rows: int,
    encoder_tokens: int,
    decoder_tokens: int,
    scored_tokens: int | None = None,
) -> int:
    """Operations of one forward and backward pass of `mode="score"`, every parameter trained.

    Three times the forward pass, which is, for B rows of S encoder and T decoder tokens,

        B (E (a(S, S) + f(S)) + bottleneck + L (a(T, T) + a(T, M) + f(T))) + 2 C V scored_tokens
        a(q, k) = 4 A (C (q + k) + q k)    attention of q tokens to k: projections, scores, values
        f(n) = 4 C F n, gated 6 C F n      feed-forward layer
        flatten:   2 S C s + 2 N s D + 2 D N s + 2 N s C + f(N), where M = N; at expansion rank r
                   2 D N r + 2 N r N s instead of 2 D N s
        attention: a(M, S) with A = C, + 2 M C D + 2 D M C + f(M)

    with E and L layers in encoder and decoder, C model width, A width of all heads together, F
    feed-forward width, V vocabulary, D latent size, N sequence length, s token size, M memory.

    Args:
        rows: B, sequences.
        encoder_tokens: S, to which the encoder's input is padded; without `mask_padding` the model
            pads it to N itself.
        decoder_tokens: T, to which the labels are padded.
        scored_tokens: labels of all rows that are not pads, since logits are made for these alone;
            default `rows * decoder_tokens`. Layers compute pads too, though not on a CPU, and
            these are counted.
    """
    t5 = config.t5_config
    if scored_tokens is None:
        scored_tokens = rows * decoder_tokens
    if not config.mask_padding:
        encoder_tokens = max(encoder_tokens, config.sequence_length)
    memory, bottleneck = find(BOTTLENECKS, config.bottleneck).flops(config, encoder_tokens)
    heads = t5.num_heads * t5.d_kv
    encoder = attention(t5.d_model, heads, encoder_tokens, encoder_tokens)
    encoder += feed_forward(t5, encoder_tokens)
    decoder = attention(t5.d_model, heads, decoder_tokens, decoder_tokens)
    decoder += attention(t5.d_model, heads, decoder_tokens, memory)
    decoder += feed_forward(t5, decoder_tokens)
    row = t5.num_layers * encoder + bottleneck + t5.num_decoder_layers * decoder
    return 3 * (rows * row + 2 * t5.d_model * t5.vocab_size * scored_tokens)


def flops_per_token(config: T5VAEConfig, length: int) -> float:
    """Training operations per token, for sequences of `length` tokens, the end token included."""
    return training_flops(config, 1, length, length) / length


def parameter_counts(model: T5VAE) -> dict[str, int]:
    """Parameters by part, on any device, meta included; a shared one counts where it comes first.

    Returns:
        "embedding", "encoder", "bottleneck", "decoder", "output" (0 where the output layer shares
        the embedding's weights), and their sum, "total".
    """
    parts = {
        "embedding": model.t5.shared,
        "encoder": model.t5.encoder,
        "bottleneck": model.bottleneck,
        "decoder": model.t5.decoder,
        "output": model.t5.lm_head,
    }
    counts: dict[str, int] = {}
    seen: set[Tensor] = set()
    for name, part in parts.items():
        new = set(part.parameters()) - seen
        counts[name] = sum(parameter.numel() for parameter in new)
        seen |= new
    return {**counts, "total": sum(counts.values())}
