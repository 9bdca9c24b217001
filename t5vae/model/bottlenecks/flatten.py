"""Flatten all tokens into the code, as the original T5-VAE does."""

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.t5.modeling_t5 import T5LayerFF

from t5vae.model import operations
from t5vae.model.bottleneck import Bottleneck


class Flatten(Bottleneck):
    """Shrink each token, flatten all T of them, one linear layer; and back.

    The design of the original T5-VAE (Greenlee, 2020). Sequences shorter than T are filled up
    with zeros, so the code does not depend on padding when pads are masked.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        t5 = config.t5_config
        self.sequence_length = config.sequence_length
        flat = config.sequence_length * config.token_size
        self.shrink = nn.Linear(t5.d_model, config.token_size)
        self.to_latent = nn.Linear(flat, config.encoded_size)
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

    @staticmethod
    def flops(config: PreTrainedConfig, tokens: int) -> tuple[int, int]:
        t5, length = config.t5_config, config.sequence_length
        flat = length * config.token_size
        shrink = t5.d_model * config.token_size * tokens
        grow = t5.d_model * flat
        expand = config.latent_size * flat
        if config.expansion_rank is not None:
            rank = length * config.expansion_rank
            expand = config.latent_size * rank + rank * flat
        products = shrink + flat * config.encoded_size + expand + grow
        return length, 2 * products + operations.feed_forward(t5, length)
