"""The kernels of MMD: functions phi(s) of the squared distance s = |x - y|^2, with phi(0) = 1."""

import math
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Mixture:
    """phi(s) = sum_k weights_k exp(-gammas_k s): every kernel here, exactly or by quadrature."""

    weights: tuple[float, ...]
    gammas: tuple[float, ...]


@dataclass(frozen=True)
class Gaussians:
    """phi(s) = mean over k < octaves of exp(-2^k gamma s)."""

    gamma: float
    octaves: int = 1

    def mixture(self) -> Mixture:
        share = 1 / self.octaves
        gammas = tuple(self.gamma * 2.0**k for k in range(self.octaves))
        return Mixture((share,) * self.octaves, gammas)


@dataclass(frozen=True)
class InverseMultiquadric:
    """phi(s) = mean over scales C of C / (C + s) (Tolstikhin et al., WAE, arXiv 1711.01558)."""

    scales: tuple[float, ...]

    def mixture(self) -> Mixture:
        """C / (C + s) = integral of C exp(-C gamma) exp(-gamma s) over gamma from 0 to infinity.

        The trapezoid rule in u = log gamma, one grid for all scales: the integrand
        C e^u exp(-C e^u) falls off doubly exponentially above and exponentially below, where the
        rule converges geometrically (Trefethen and Weideman, SIAM Review 56, 2014). From
        C gamma = e^-24 for the widest scale to e^4.5 for the narrowest.
        """
        return _on_a_grid(self.scales)


@cache
def _on_a_grid(scales: tuple[float, ...]) -> Mixture:
    step = 0.45
    low, high = -24 - math.log(max(scales)), 4.5 - math.log(min(scales))
    gammas = [math.exp(low + step * i) for i in range(math.ceil((high - low) / step) + 1)]
    mass = [sum(c * g * math.exp(-c * g) for c in scales) for g in gammas]
    total = sum(mass)
    return Mixture(tuple(m / total for m in mass), tuple(gammas))


Kernel = Gaussians | InverseMultiquadric


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
        return Gaussians(gamma)
    if name == "multi_rbf":
        return Gaussians(gamma / 4, octaves=5)
    if name == "imq":
        return InverseMultiquadric(tuple(c / gamma for c in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)))
    if name == "legacy":
        return Gaussians(1 / dimensions**2)
    raise ValueError(f"kernel is {name!r}; choose rbf, multi_rbf, imq or legacy")
