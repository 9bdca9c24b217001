"""Between the encoder and the decoder: states -> one code -> memory.

Shapes: B sequences, T tokens, D latent size, E encoded size, M memory length, C model width.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from transformers import PreTrainedConfig


class Bottleneck(nn.Module, ABC):
    """Squeezes the encoder's states through one code.

    Args:
        config: a `T5VAEConfig`. `t5_config` is that of the T5 inside; `encoded_size` is E: D, or
            2 D for a mean and a log-variance where codes have a posterior.
    """

    @abstractmethod
    def __init__(self, config: PreTrainedConfig):
        super().__init__()

    @abstractmethod
    def compress(self, states_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, E] from states, of which a mask of 0 hides some.

        Raises:
            ValueError: for sequences longer than it takes.
        """

    @abstractmethod
    def expand(self, z_BD: Tensor) -> Tensor:
        """The decoder's memory, [B, M, C]."""

    @staticmethod
    @abstractmethod
    def flops(config: PreTrainedConfig, tokens: int) -> tuple[int, int]:
        """M, and the operations of the forward pass of a row of so many encoder tokens."""
