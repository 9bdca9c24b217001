"""Priors: what codes are drawn from.

Shapes: N rows, D latent size.
"""

import torch
from torch import Generator, Tensor

from shards.errors import UserError

PRIORS = ("normal", "gaussian")


class Normal:
    """The prior of training, N(0, I)."""

    def __init__(self, latent_size: int):
        self.latent_size = latent_size

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n codes, float32 [n, D]."""
        return torch.randn(n, self.latent_size, generator=generator)


class Gaussian:
    """The normal distribution with the mean and covariance of given codes.

    Closer to where a model really puts its codes than N(0, I), with the same tools: what
    Ghosh et al. (arXiv 1903.12436) call ex-post density estimation.

    Args:
        codes_ND: float [N, D], N >= 2. With N <= D it varies only inside the span of the codes.
    """

    def __init__(self, codes_ND: Tensor):
        if len(codes_ND) < 2:
            raise UserError(
                f"the prior 'gaussian' is fitted on codes; {len(codes_ND)} given, at least 2 needed"
            )
        codes_ND = codes_ND.double()
        self.mean_D = codes_ND.mean(0)
        variances_D, axes_DD = torch.linalg.eigh(
            torch.cov(codes_ND.T).reshape(2 * codes_ND.shape[1:])
        )
        self.root_DD = axes_DD * variances_D.clamp(min=0).sqrt()

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n codes, float32 [n, D]."""
        noise_ND = torch.randn(n, len(self.mean_D), generator=generator, dtype=torch.float64)
        return (self.mean_D + noise_ND @ self.root_DD.T).float()
