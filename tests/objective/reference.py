"""MMD^2 as the formulas say it: fp64, memory O(N^2), autograd. What tests hold the others against.

Nothing here is shared with the implementations but the names and the draws of the sampled prior.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t5vae.objective.priors import draws


class Terms(NamedTuple):
    """MMD^2 = zz - 2 zp + pp."""

    zz: Tensor
    zp: Tensor
    pp: Tensor

    @property
    def value(self) -> Tensor:
        return self.zz - 2 * self.zp + self.pp

    @property
    def magnitude(self) -> float:
        """What rounding errors are relative to."""
        return (self.zz + 2 * self.zp + self.pp).item()


def terms(
    z_ND: Tensor,
    kernel: str = "multi_rbf",
    prior: str = "normal",
    estimator: str = "u",
    *,
    sigma: float = 1.0,
    weights_B: Tensor | None = None,
    generator_seed: int = 0,
) -> Terms:
    """The three terms, fp64 scalars with gradient to `z_ND`; arguments as in `mmd`."""
    if weights_B is not None:
        z_ND = z_ND[weights_B > 0]
    z_ND = z_ND.double()
    formulas = Formulas(kernel, z_ND.shape[1], sigma)
    zz = _within(formulas, z_ND, estimator)
    if prior == "sampled":
        p_ND = draws(len(z_ND), z_ND.shape[1], sigma, generator_seed).double()
        zp = formulas.phi(squared_distances(z_ND, p_ND)).mean()
        return Terms(zz, zp, _within(formulas, p_ND, estimator))
    h, c = {
        "normal": (formulas.normal_h, formulas.normal_c),
        "uniform": (formulas.uniform_h, formulas.uniform_c),
    }[prior]
    return Terms(zz, h(z_ND).mean(), c())


def squared_distances(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """|x_i - y_j|^2, [b, N]."""
    s_BN = x_BD.square().sum(1)[:, None] + y_ND.square().sum(1) - 2 * x_BD @ y_ND.T
    return s_BN.clamp_min(0)


def _within(formulas: "Formulas", x_ND: Tensor, estimator: str) -> Tensor:
    count = len(x_ND)
    phi_NN = formulas.phi(squared_distances(x_ND, x_ND))
    if estimator == "v":
        return phi_NN.sum() / count**2
    return (phi_NN.sum() - phi_NN.diagonal().sum()) / (count * (count - 1))


@dataclass
class Formulas:
    """phi(s), and its expectations h(z) and c under the priors, in D dimensions."""

    kernel: str
    dimensions: int
    sigma: float = 1.0

    def phi(self, s: Tensor) -> Tensor:
        if self.kernel == "imq":
            return sum(scale / (scale + s) for scale in self.scales()) / 7
        return sum(torch.exp(-gamma * s) for gamma in self.gammas()) / len(self.gammas())

    def gammas(self) -> list[float]:
        usual = 1 / (2 * self.dimensions * self.sigma**2)
        return {
            "rbf": [usual],
            "multi_rbf": [usual * octave for octave in (0.25, 0.5, 1, 2, 4)],
            "legacy": [1 / self.dimensions**2],
        }[self.kernel]

    def scales(self) -> list[float]:
        usual = 2 * self.dimensions * self.sigma**2
        return [usual * scale for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10)]

    def normal_h(self, z_ND: Tensor) -> Tensor:
        return self._mean_over_gammas(self._normal_h_of, z_ND.square().sum(1))

    def normal_c(self) -> Tensor:
        def of(gamma: float) -> Tensor:
            return torch.tensor((1 + 4 * gamma * self.sigma**2) ** (-self.dimensions / 2)).double()

        return self._mean_over_gammas(of)

    def uniform_h(self, z_ND: Tensor) -> Tensor:
        return self._mean_over_gammas(self._uniform_h_of, z_ND)

    def uniform_c(self) -> Tensor:
        def of(gamma: float) -> Tensor:
            # phi over the difference of two coordinates, whose density is a triangle.
            nodes, masses = _panels()
            difference = 2 * self.sigma * nodes
            phi = torch.exp(-gamma * difference.square())
            return (2 * (1 - nodes) * phi * masses).sum() ** self.dimensions

        return self._mean_over_gammas(of)

    def _normal_h_of(self, gamma: float, squares_N: Tensor) -> Tensor:
        spread = 1 + 2 * gamma * self.sigma**2
        return spread ** (-self.dimensions / 2) * torch.exp(-gamma / spread * squares_N)

    def _uniform_h_of(self, gamma: float, z_ND: Tensor) -> Tensor:
        root, a = math.sqrt(gamma), self.sigma
        mass_ND = torch.erf(root * (a - z_ND)) + torch.erf(root * (a + z_ND))
        return (mass_ND * math.sqrt(math.pi / gamma) / (4 * a)).prod(1)

    def _mean_over_gammas(self, of, *z: Tensor) -> Tensor:
        """The mean over the kernel's Gaussians; over v ~ Exp(1) with gamma = v / C for imq."""
        if self.kernel != "imq":
            return sum(of(gamma, *z) for gamma in self.gammas()) / len(self.gammas())
        nodes, masses = exponential_quadrature()
        return (
            sum(
                mass * of(node / scale, *z)
                for scale in self.scales()
                for node, mass in zip(nodes.tolist(), masses.tolist(), strict=True)
            )
            / 7
        )


@lru_cache
def exponential_quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and masses of an expectation over v ~ Exp(1): Gauss-Legendre on panels doubling from
    1e-12 to 40, 16 nodes each."""
    edges = torch.cat([torch.zeros(1).double(), 40 * 2.0 ** torch.arange(-45, 1).double()])
    v, masses = _gauss_legendre(edges)
    return v, masses * torch.exp(-v)


@lru_cache
def _panels() -> tuple[Tensor, Tensor]:
    """Nodes and masses of an integral from 0 to 1, on panels that double from 2^-20."""
    return _gauss_legendre(torch.cat([torch.zeros(1), 2.0 ** torch.arange(-20, 1)]).double())


def _gauss_legendre(edges: Tensor) -> tuple[Tensor, Tensor]:
    nodes, masses = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))
    low, high = edges[:-1, None], edges[1:, None]
    points = (high + low) / 2 + (high - low) / 2 * nodes
    return points.flatten(), ((high - low) / 2 * masses).flatten()
