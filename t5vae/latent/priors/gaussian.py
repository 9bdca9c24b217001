"""A normal distribution fitted on codes.

Shapes: N rows, D latent size.
"""

from typing import Self

import torch
from torch import Generator, Tensor

from t5vae.latent.priors.prior import Prior, log_normal, stored


class Gaussian(Prior):
    """The normal distribution with the mean and covariance of given codes.

    Closer to where a model really puts its codes than N(0, I), with the same tools: what
    Ghosh et al. (arXiv 1903.12436) call ex-post density estimation. No direction has less than
    1e-6 of the variance of the largest: one in which the codes do not vary, as there are with
    N <= D, would make every density 0 or infinite.
    """

    fewest = 2

    def __init__(self, mean_D: Tensor, axes_DD: Tensor, scales_D: Tensor):
        self.mean_D, self.axes_DD, self.scales_D = mean_D, axes_DD, scales_D

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        codes_ND = codes_ND.double()
        covariance_DD = torch.cov(codes_ND.T).reshape(2 * codes_ND.shape[1:])
        variances_D, axes_DD = torch.linalg.eigh(covariance_DD)
        floor = 1e-6 * variances_D[-1].item() or 1e-6
        return cls(codes_ND.mean(0), axes_DD, variances_D.clamp(min=floor).sqrt())

    def draw(self, n: int, generator: Generator) -> Tensor:
        shape = n, len(self.mean_D)
        return self.colour(torch.randn(shape, generator=generator, dtype=torch.float64))

    def log_density(self, z_ND: Tensor) -> Tensor:
        return log_normal(self.whiten(z_ND)) + self.log_whitening

    def whiten(self, z_ND: Tensor) -> Tensor:
        """Codes to coordinates of mean 0 and covariance I, float64 [N, D]."""
        return (z_ND.double() - self.mean_D) @ self.axes_DD / self.scales_D

    def colour(self, white_ND: Tensor) -> Tensor:
        """The inverse of `whiten`, float32 [N, D]."""
        return (self.mean_D + (white_ND.double() * self.scales_D) @ self.axes_DD.T).float()

    @property
    def log_whitening(self) -> Tensor:
        """Log of the factor by which `whiten` changes volumes."""
        return -self.scales_D.log().sum()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean_D": self.mean_D, "axes_DD": self.axes_DD, "scales_D": self.scales_D}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        size = tensors["mean_D"].numel()
        shapes = {"mean_D": (size,), "axes_DD": (size, size), "scales_D": (size,)}
        return cls(*(stored(tensors, name, *shape) for name, shape in shapes.items()))
