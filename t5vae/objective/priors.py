"""What a kernel expects under a prior, in closed form, and draws of the priors.

h(z) = E phi(|z - p|^2) and c = E phi(|p - p'|^2) for p, p' drawn from the prior, where phi is a
mixture of exp(-gamma s). Each comes minus 1, so that nearly flat kernels keep their digits, and is
computed in fp64, since that costs little. Codes are float32. Shapes: b codes, D latent size,
K components of the mixture.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from t5vae.objective.kernels import Mixture

Cross = Callable[[Tensor, Mixture, float], tuple[Tensor, Tensor]]
Constant = Callable[[int, Mixture, float], float]


def normal_cross(z_BD: Tensor, mixture: Mixture, sigma: float) -> tuple[Tensor, Tensor]:
    """Under N(0, sigma^2 I) (Rustamov, arXiv 1901.03227, eq. 3).

    Returns:
        float64 scalar: sum_i (h(z_i) - 1); float32 [b, D]: the gradient of h at each code.
    """
    squares_B1 = torch.linalg.vector_norm(z_BD, dim=1, keepdim=True).double().square()
    weights_K, gammas_K = _components(mixture, z_BD.device)
    spread_K = 1 + 2 * gammas_K * sigma**2
    log_BK = squares_B1 * (-gammas_K / spread_K)
    log_BK -= 0.5 * z_BD.shape[1] * spread_K.log()
    slope_B = log_BK.exp() @ (-2 * weights_K * gammas_K / spread_K)
    return (log_BK.expm1() @ weights_K).sum(), z_BD * slope_B[:, None].to(z_BD.dtype)


@cache
def _components(mixture: Mixture, device: torch.device) -> Tensor:
    """Weights and gammas, float64 [2, K], which travel to an accelerator once."""
    return torch.tensor((mixture.weights, mixture.gammas), dtype=torch.float64, device=device)


@cache
def normal_constant(dimensions: int, mixture: Mixture, sigma: float) -> float:
    """c - 1 under N(0, sigma^2 I) (the same source)."""
    return sum(
        weight * math.expm1(-0.5 * dimensions * math.log1p(4 * gamma * sigma**2))
        for weight, gamma in zip(mixture.weights, mixture.gammas, strict=True)
    )


def uniform_cross(z_BD: Tensor, mixture: Mixture, sigma: float) -> tuple[Tensor, Tensor]:
    """Under the uniform distribution on (-sigma, sigma)^D: returns as `normal_cross`.

    A Gaussian's integral over an interval, for each coordinate:
    E exp(-gamma (z - p)^2) = sqrt(pi / gamma) / (4 sigma) *
    (erfc(sqrt(gamma) (|z| - sigma)) - erfc(sqrt(gamma) (|z| + sigma))).
    """
    z_BD = z_BD.double()
    near_BD, far_BD = z_BD.abs() - sigma, z_BD.abs() + sigma
    total = torch.zeros((), dtype=torch.float64, device=z_BD.device)
    gradient_BD = torch.zeros_like(z_BD)
    for weight, gamma in zip(mixture.weights, mixture.gammas, strict=True):
        root = math.sqrt(gamma)
        # Where this underflows, so does h.
        mass_BD = (torch.erfc(root * near_BD) - torch.erfc(root * far_BD)).clamp_min(1e-300)
        log_B = (mass_BD * (math.sqrt(math.pi / gamma) / (4 * sigma))).log().sum(1)
        total += weight * torch.expm1(log_B).sum()
        edges_BD = torch.exp(-gamma * far_BD.square()) - torch.exp(-gamma * near_BD.square())
        slope_BD = 2 * root / math.sqrt(math.pi) * edges_BD / mass_BD
        gradient_BD += weight * log_B.exp()[:, None] * slope_BD
    return total, (gradient_BD * z_BD.sign()).float()


@cache
def uniform_constant(dimensions: int, mixture: Mixture, sigma: float) -> float:
    """c - 1 under the uniform distribution: the same integral once more."""
    total = 0.0
    for weight, gamma in zip(mixture.weights, mixture.gammas, strict=True):
        x = gamma * (2 * sigma) ** 2
        mean = (math.sqrt(math.pi * x) * math.erf(math.sqrt(x)) + math.expm1(-x)) / x
        total += weight * math.expm1(dimensions * math.log(mean))
    return total


CLOSED: dict[str, tuple[Cross, Constant]] = {
    "normal": (normal_cross, normal_constant),
    "uniform": (uniform_cross, uniform_constant),
}


def draws(count: int, dimensions: int, sigma: float, seed: int) -> Tensor:
    """Draws of N(0, sigma^2 I), float32 [count, D] on the CPU: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return sigma * torch.randn(count, dimensions, generator=generator)
