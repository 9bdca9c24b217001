"""The prior of training.

Shapes: N rows, D latent size.
"""

from typing import Self

import torch
from torch import Generator, Tensor

from t5vae.latent.priors.prior import Prior, log_normal


class Normal(Prior):
    """The prior of training, N(0, I)."""

    fewest = 0

    def __init__(self, latent_size: int):
        self.latent_size = latent_size

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        return cls(codes_ND.shape[1])

    def draw(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.latent_size, generator=generator)

    def log_density(self, z_ND: Tensor) -> Tensor:
        return log_normal(z_ND.double())

    def tensors(self) -> dict[str, Tensor]:
        return {"latent_size": torch.tensor(self.latent_size)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(int(tensors["latent_size"]))
