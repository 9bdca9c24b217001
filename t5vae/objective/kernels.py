"""Kernels of MMD, their derivatives, and their expectations under the prior in closed form.

Notation: s = |x - y|^2, phi(s) a kernel, P(s) = -phi'(s), h(z) = E phi(|z - p|^2) and
c = E phi(|p - p'|^2) for p, p' drawn from the prior N(0, sigma^2 I) in D dimensions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """phi(s) = sum_k w_k exp(-gamma_k s): every kernel here, exactly or by quadrature."""

    weights: tuple[float, ...]
    gammas: tuple[float, ...]

    def pair(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """phi(s) and P(s), of the shape of `s`."""
        phi, slope = torch.zeros_like(s), torch.zeros_like(s)
        for weight, gamma in zip(self.weights, self.gammas, strict=True):
            e = torch.exp(-gamma * s)
            phi += weight * e
            slope += weight * gamma * e
        return phi, slope

    def prior_cross(self, squared_norm: Tensor, dimensions: int, sigma: float) -> Tensor:
        """h(z) from |z|^2 (Rustamov, arXiv 1901.03227, eq. 3)."""
        h = torch.zeros_like(squared_norm)
        for weight, gamma in zip(self.weights, self.gammas, strict=True):
            spread = 1 + 2 * gamma * sigma**2
            log_scale = -0.5 * dimensions * math.log(spread)
            h = h + weight * torch.exp(log_scale - gamma / spread * squared_norm)
        return h

    def prior_self(self, dimensions: int, sigma: float) -> float:
        """c (the same source)."""
        return sum(
            weight * math.exp(-0.5 * dimensions * math.log1p(4 * gamma * sigma**2))
            for weight, gamma in zip(self.weights, self.gammas, strict=True)
        )


@dataclass(frozen=True)
class InverseMultiquadric:
    """phi(s) = mean over scales of C / (C + s) (Tolstikhin et al., WAE, arXiv 1711.01558)."""

    scales: tuple[float, ...]

    def pair(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """phi(s) and P(s), of the shape of `s`."""
        phi, slope = torch.zeros_like(s), torch.zeros_like(s)
        for scale in self.scales:
            value = scale / (scale + s)
            phi += value / len(self.scales)
            slope += value.square() / (scale * len(self.scales))
        return phi, slope

    def as_mixture(self) -> GaussianMixture:
        """C / (C + s) = E exp(-v s / C) for v ~ Exp(1), by the trapezoid rule in log v.

        64 points from e^-24 to e^4.5: the integrand v exp(-v) falls off doubly exponentially above
        and exponentially below, where the rule converges geometrically (Trefethen and Weideman,
        SIAM Review 56, 2014).
        """
        low, high, points = -24.0, 4.5, 64
        step = (high - low) / (points - 1)
        nodes = [math.exp(low + step * i) for i in range(points)]
        mass = [step * v * math.exp(-v) for v in nodes]
        total = sum(mass)
        return GaussianMixture(
            weights=tuple(m / total / len(self.scales) for _ in self.scales for m in mass),
            gammas=tuple(v / scale for scale in self.scales for v in nodes),
        )

    def prior_cross(self, squared_norm: Tensor, dimensions: int, sigma: float) -> Tensor:
        """h(z) from |z|^2."""
        mixture = self.as_mixture()
        options = {"dtype": squared_norm.dtype, "device": squared_norm.device}
        gamma = torch.tensor(mixture.gammas, **options)
        spread = 1 + 2 * gamma * sigma**2
        log_weight = torch.tensor(mixture.weights, **options).log()
        log_weight = log_weight - 0.5 * dimensions * spread.log()
        return torch.exp(log_weight - squared_norm[:, None] * (gamma / spread)).sum(1)

    def prior_self(self, dimensions: int, sigma: float) -> float:
        """c."""
        return self.as_mixture().prior_self(dimensions, sigma)


Kernel = GaussianMixture | InverseMultiquadric


def make_kernel(name: str, dimensions: int, sigma: float = 1.0) -> Kernel:
    """A kernel by name, its bandwidth set by the dimensions and the prior's scale.

    - "rbf": gamma = 1 / (2 D sigma^2), so that s of two draws of the prior is near 1 / gamma;
    - "multi_rbf": the mean of five octaves around it;
    - "imq": the mean over C = 2 D sigma^2 x {.1 .2 .5 1 2 5 10};
    - "legacy": the original T5-VAE's exp(-mean((x - y)^2) / D), that is gamma = 1 / D^2.

    Raises:
        ValueError: for an unknown name or no dimensions.
    """
    if dimensions < 1:
        raise ValueError("a code of no dimensions has no kernel")
    gamma = 1 / (2 * dimensions * sigma**2)
    if name == "rbf":
        return GaussianMixture((1.0,), (gamma,))
    if name == "multi_rbf":
        return GaussianMixture((0.2,) * 5, tuple(gamma * 2.0**k for k in range(-2, 3)))
    if name == "imq":
        base = 2 * dimensions * sigma**2
        return InverseMultiquadric(tuple(base * c for c in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)))
    if name == "legacy":
        return GaussianMixture((1.0,), (1 / dimensions**2,))
    raise ValueError(f"kernel is {name!r}; choose rbf, multi_rbf, imq or legacy")
