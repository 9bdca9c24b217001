"""Between the encoder and the decoder: states -> one code -> memory.

Shapes: B sequences, T tokens, D latent size, M memory length, C model width.
A bottleneck is a module made from a `T5VAEConfig` (not imported here: it reads `BOTTLENECKS`), with
`compress(states_BTC, mask_BT) -> z_BD` and `expand(z_BD) -> memory_BMC`. Its entries in
`BOTTLENECKS` here and in `flops.py` make it known.
"""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.t5.modeling_t5 import T5LayerFF


class FlattenBottleneck(nn.Module):
    """Shrink each token, flatten all T of them, one linear layer; and back.

    The design of the original T5-VAE (Greenlee, 2020). Sequences shorter than T are filled up
    with zeros, so the code does not depend on padding when pads are masked.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        t5 = config.t5_config
        self.sequence_length = config.sequence_length
        flat = config.sequence_length * config.token_size
        self.shrink = nn.Linear(t5.d_model, config.token_size)
        self.to_latent = nn.Linear(flat, config.latent_size)
        if config.expansion_rank is None:
            self.from_latent: nn.Module = nn.Linear(config.latent_size, flat)
        else:
            rank = config.sequence_length * config.expansion_rank
            self.from_latent = nn.Sequential(
                nn.Linear(config.latent_size, rank), nn.Linear(rank, flat)
            )
        self.grow = nn.Linear(config.token_size, t5.d_model)
        t5.dropout_rate = 0.0
        self.feed_forward = T5LayerFF(t5)

    def compress(self, states_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        tokens = self.shrink(states_BTC) * mask_BT[..., None]
        short = self.sequence_length - tokens.shape[1]
        if short < 0:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens is longer than sequence_length "
                f"{self.sequence_length}"
            )
        return self.to_latent(nn.functional.pad(tokens, (0, 0, 0, short)).flatten(1))

    def expand(self, z_BD: Tensor) -> Tensor:
        tokens = self.from_latent(z_BD).unflatten(1, (self.sequence_length, -1))
        return self.feed_forward(self.grow(tokens))


class AttentionBottleneck(nn.Module):
    """Learned queries pool a sequence of any length into the code; the code becomes M tokens.

    Pooling by multi-head attention over the encoder's states (Lee et al., Set Transformer,
    arXiv 1810.00825, eq. 11).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        t5 = config.t5_config
        self.memory_length = config.memory_length
        self.queries = nn.Embedding(config.memory_length, t5.d_model)
        self.pool = nn.MultiheadAttention(t5.d_model, t5.num_heads, batch_first=True)
        self.to_latent = nn.Linear(config.memory_length * t5.d_model, config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, config.memory_length * t5.d_model)
        t5.dropout_rate = 0.0
        self.feed_forward = T5LayerFF(t5)

    def compress(self, states_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        queries = self.queries.weight.expand(states_BTC.shape[0], -1, -1)
        pooled, _ = self.pool(
            queries, states_BTC, states_BTC, key_padding_mask=~mask_BT.bool(), need_weights=False
        )
        return self.to_latent(pooled.flatten(1))

    def expand(self, z_BD: Tensor) -> Tensor:
        memory = self.from_latent(z_BD).unflatten(1, (self.memory_length, -1))
        return self.feed_forward(memory)


BOTTLENECKS: dict[str, type[nn.Module]] = {
    "flatten": FlattenBottleneck,
    "attention": AttentionBottleneck,
}
