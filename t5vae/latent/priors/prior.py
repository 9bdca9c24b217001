"""A prior: what codes are drawn from, and how dense they lie.

Shapes: N rows, D latent size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Generator, Tensor


def log_normal(noise_ND: Tensor) -> Tensor:
    """Log density of N(0, I), [N]."""
    return -0.5 * (noise_ND.square() + math.log(2 * math.pi)).sum(-1)


def stored(tensors: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    """One of the tensors that a prior is made of, finite, float64 of that shape.

    Raises:
        KeyError, ValueError: there is none.
    """
    tensor = tensors[name].double()
    if tensor.shape != shape or not tensor.isfinite().all():
        raise ValueError(f"{name} is not {list(shape)} finite numbers")
    return tensor


class Prior(ABC):
    """A distribution of codes.

    Attributes:
        fewest: how many codes a fit needs; 0 for a prior that is the same whatever the codes.
    """

    fewest: ClassVar[int]

    @classmethod
    @abstractmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        """The prior of finite codes, float [N, D], N >= `fewest`."""

    @abstractmethod
    def draw(self, n: int, generator: Generator) -> Tensor:
        """n codes, float32 [n, D]."""

    @abstractmethod
    def log_density(self, z_ND: Tensor) -> Tensor:
        """Of codes, float [N, D]: float64 [N], in nats."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that it is made of, by name."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The prior that `tensors` was called on; KeyError, RuntimeError or ValueError where they
        are none."""
