"""Codes to decode: draws from a prior, and paths between codes.

Shapes: N rows, D latent size, S steps of a path.
"""

import torch
from torch import Generator, Tensor

from shards.errors import UserError

PRIORS = ("normal", "gaussian")
METHODS = ("linear", "slerp")


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


def path(a_ND: Tensor, b_ND: Tensor, steps: int, method: str = "linear") -> Tensor:
    """Evenly spaced codes from each a to its b, both ends included and exact.

    Args:
        a_ND, b_ND: float [N, D].
        steps: S, at least 2.
        method: "linear", or "slerp", which turns from a to b at an even pace around the origin
            (Shoemake, SIGGRAPH 1985); where a and b point the same way, or exactly opposite ways,
            it is the straight line.

    Returns:
        float [N, S, D].

    Raises:
        UserError: for an unknown method or fewer than two steps.
    """
    if steps < 2:
        raise UserError(f"an interpolation has at least 2 steps, its ends; {steps} given")
    if method not in METHODS:
        raise UserError(f"unknown interpolation method {method!r}; choose linear or slerp")
    a_N1D, b_N1D = a_ND[:, None], b_ND[:, None]
    share_S1 = torch.linspace(0, 1, steps, dtype=a_ND.dtype, device=a_ND.device)[:, None]
    straight_NSD = torch.lerp(a_N1D, b_N1D, share_S1)
    if method == "linear":
        return straight_NSD
    cosine_N = torch.nn.functional.cosine_similarity(a_ND, b_ND).clamp(-1, 1)
    angle_N11 = cosine_N.arccos()[:, None, None]
    sine_N11 = angle_N11.sin()
    turned_NSD = (
        ((1 - share_S1) * angle_N11).sin() * a_N1D + (share_S1 * angle_N11).sin() * b_N1D
    ) / sine_N11
    return torch.where(sine_N11 > 1e-3, turned_NSD, straight_NSD)
