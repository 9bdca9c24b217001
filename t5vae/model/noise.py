"""Random numbers that are a pure function of a key: the same for a row on any rank.

Training-time noise drawn from a generator would depend on how the rows of a batch are split over
ranks and micro batches. Here every number is a hash of (seed, row key, index), by splitmix64
(Steele, Lea and Flood, 2014), so that a run resumed on another number of ranks repeats it.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from t5vae.common.devices import sent

NOISE, ENCODER_MASK, WORD_DROPOUT, POSTERIOR = range(4)  # streams


@dataclass
class Regularisers:
    """Training-time noise, keyed by row so that it does not depend on the split over ranks.

    Attributes:
        keys_B: int64 [B], from `row_keys`.
        latent_noise: standard deviation of the Gaussian added to the code.
        input_mask: probability that an encoder input token is replaced by the unknown token;
            pad, start and end tokens never are.
        word_dropout: the same for the decoder's inputs.
    """

    keys_B: Tensor
    latent_noise: float = 0.0
    input_mask: float = 0.0
    word_dropout: float = 0.0

    def drop(
        self, ids_BT: Tensor, rate: float, stream: int, special: Collection[int], instead: int
    ) -> Tensor:
        """Replace tokens at random, but for special ones.

        Args:
            ids_BT: int64 [B, T].
            rate: probability of each.
            stream: of the random numbers.
            special: ids that stay.
            instead: the id in their place.
        """
        if not rate:
            return ids_BT
        dropped_BT = keyed_uniform(self.keys_B, ids_BT.shape[1], stream) < rate
        for each in special:
            dropped_BT &= ids_BT != each
        return ids_BT.masked_fill(dropped_BT, instead)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Hash int64 to int64, elementwise."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def keyed_uniform(keys_B: Tensor, count: int, stream: int) -> Tensor:
    """Uniform numbers in (0, 1), float32 [B, count], a pure function of (key, stream, index).

    Args:
        keys_B: int64 [B], one key a row.
        stream: separates the uses of one key (noise, masking, ...).
    """
    index = torch.arange(count, device=keys_B.device) + (stream << 32)
    bits = splitmix64(splitmix64(keys_B)[:, None] ^ splitmix64(index)[None, :])
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def keyed_normal(keys_B: Tensor, count: int, stream: int) -> Tensor:
    """Standard normal numbers, float32 [B, count], by Box and Muller's transform."""
    u, v = keyed_uniform(keys_B, 2 * count, stream).chunk(2, dim=1)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def row_keys(seed: int, position: int, sequence_B: Tensor) -> Tensor:
    """One key a row, int64 [B], from the run's seed, the step's position in the stream of data
    (`consumed` before the step) and each row's sequence number."""
    step = splitmix64(splitmix64(torch.tensor(_signed(seed))) + position)
    return splitmix64(sent(step, sequence_B.device) ^ sequence_B)
