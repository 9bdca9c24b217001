"""A mixture of normal distributions fitted on codes.

Shapes: N rows, D latent size, K components.
"""

import warnings
from typing import Self

import torch
from torch import Generator, Tensor

from t5vae.latent.priors.gaussian import Gaussian
from t5vae.latent.priors.prior import Prior, log_normal, stored


class Mixture(Prior):
    """A mixture of normal distributions, each with a covariance of its own.

    Fitted by expectation maximisation (scikit-learn's GaussianMixture) in the coordinates that a
    Gaussian whitens.
    """

    fewest = 2

    COMPONENTS = 16
    ROWS_A_PARAMETER = 4.0  # at least, or there are fewer components
    RIDGE = 1e-3  # added to the variances, which are about 1

    def __init__(self, frame: Gaussian, weights_K: Tensor, means_KD: Tensor, roots_KDD: Tensor):
        self.frame = frame
        self.weights_K, self.means_KD, self.roots_KDD = weights_K, means_KD, roots_KDD

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        frame = Gaussian.fit(codes_ND)
        N, D = codes_ND.shape
        components = min(cls.COMPONENTS, int(N / (D * cls.ROWS_A_PARAMETER)))
        estimator = GaussianMixture(
            max(1, components), reg_covar=cls.RIDGE, max_iter=50, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(frame.whiten(codes_ND).numpy())
        weights_K, means_KD, covariances_KDD = map(
            torch.from_numpy, (estimator.weights_, estimator.means_, estimator.covariances_)
        )
        return cls(frame, weights_K, means_KD, torch.linalg.cholesky(covariances_KDD))

    def draw(self, n: int, generator: Generator) -> Tensor:
        which_N = torch.multinomial(self.weights_K, n, replacement=True, generator=generator)
        noise_ND = torch.randn(n, self.means_KD.shape[1], generator=generator, dtype=torch.float64)
        white_ND = torch.empty_like(noise_ND)
        for k, (mean_D, root_DD) in enumerate(zip(self.means_KD, self.roots_KDD, strict=True)):
            rows_N = which_N == k
            white_ND[rows_N] = mean_D + noise_ND[rows_N] @ root_DD.T
        return self.frame.colour(white_ND)

    def log_density(self, z_ND: Tensor) -> Tensor:
        white_ND = self.frame.whiten(z_ND)
        logs_N = []
        for weight, mean_D, root_DD in zip(
            self.weights_K, self.means_KD, self.roots_KDD, strict=True
        ):
            noise_DN = torch.linalg.solve_triangular(root_DD, (white_ND - mean_D).T, upper=False)
            log_volume = root_DD.diagonal().log().sum()
            logs_N.append(weight.log() + log_normal(noise_DN.T) - log_volume)
        return torch.stack(logs_N).logsumexp(0) + self.frame.log_whitening

    def tensors(self) -> dict[str, Tensor]:
        return {
            **self.frame.tensors(),
            "weights_K": self.weights_K,
            "means_KD": self.means_KD,
            "roots_KDD": self.roots_KDD,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        frame = Gaussian.from_tensors(tensors)
        parts, size = tensors["weights_K"].numel(), len(frame.mean_D)
        shapes = {"weights_K": (), "means_KD": (size,), "roots_KDD": (size, size)}
        return cls(frame, *(stored(tensors, name, parts, *own) for name, own in shapes.items()))
