"""Pool a sequence of any length with learned queries."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.t5.modeling_t5 import T5LayerFF

from t5vae.model import operations
from t5vae.model.bottleneck import Bottleneck


class Attention(Bottleneck):
    """Learned queries pool a sequence of any length into the code; the code becomes M tokens.

    Pooling by multi-head attention over the encoder's states (Lee et al., Set Transformer,
    arXiv 1810.00825, eq. 11).
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        t5 = config.t5_config
        self.memory_length = config.memory_length
        self.queries = nn.Embedding(config.memory_length, t5.d_model)
        self.pool = nn.MultiheadAttention(t5.d_model, t5.num_heads, batch_first=True)
        self.to_latent = nn.Linear(config.memory_length * t5.d_model, config.encoded_size)
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

    @staticmethod
    def flops(config: PreTrainedConfig, tokens: int) -> tuple[int, int]:
        t5, memory = config.t5_config, config.memory_length
        pool = operations.attention(t5.d_model, t5.d_model, memory, tokens)
        products = memory * t5.d_model * (config.encoded_size + config.latent_size)
        return memory, pool + 2 * products + operations.feed_forward(t5, memory)
