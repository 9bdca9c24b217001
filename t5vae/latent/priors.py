"""Priors: what codes are drawn from, and how dense they lie.

Shapes: N rows, D latent size, K components of a mixture, B rows of a training batch.
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from t5vae.common.errors import UserError
from t5vae.common.progress import stage
from t5vae.latent.artifacts import damaged, read_tensors, write_tensors

FORMAT_VERSION = 1
PRIORS = ("normal", "gaussian", "gmm", "flow")


def fit_prior(name: str, codes_ND: Tensor, *, seed: int = 0) -> "Prior":
    """Fit a prior on codes.

    Args:
        name: one of `PRIORS`.
        codes_ND: float [N, D].
        seed: of what is random in a fit; the same seed and codes give the same prior.

    Raises:
        UserError: for an unknown name, too few codes, or one that is not finite.
    """
    if name not in KINDS:
        raise UserError(f"unknown prior {name!r}; choose one of {', '.join(PRIORS)}")
    kind = KINDS[name]
    if len(codes_ND) < kind.fewest:
        raise UserError(
            f"the prior {name!r} is fitted on codes; {len(codes_ND)} given, at least "
            f"{kind.fewest} needed"
        )
    if not codes_ND.isfinite().all():
        raise UserError(f"the prior {name!r} is fitted on codes; some given are not finite")
    return kind.fit(codes_ND, seed)


def save_prior(prior: "Prior", path: Path, made_from: dict[str, Any]) -> None:
    """Keep a prior in a file, with what it was made from, fit for JSON.

    Raises:
        UserError: if that fails.
    """
    write_tensors(path, prior.tensors(), {"prior": prior.name}, FORMAT_VERSION, made_from)


def load_prior(path: Path, made_from: dict[str, Any]) -> "Prior | None":
    """The prior kept in a file; None if there is none, or it was made from something else.

    Raises:
        UserError: the file is damaged.
    """
    kept = read_tensors(path, FORMAT_VERSION, made_from)
    if kept is None:
        return None
    tensors, about = kept
    try:
        return KINDS[about["prior"]].from_tensors(tensors)
    except (KeyError, RuntimeError) as error:
        raise damaged(path, error) from None


class Prior(ABC):
    """A distribution of codes.

    Attributes:
        name: one of `PRIORS`.
        fewest: how many codes a fit needs.
    """

    name: ClassVar[str]
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
        """The prior that `tensors` was called on; KeyError or RuntimeError where they are none."""


class Normal(Prior):
    """The prior of training, N(0, I)."""

    name, fewest = "normal", 0

    def __init__(self, latent_size: int):
        self.latent_size = latent_size

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        return cls(codes_ND.shape[1])

    def draw(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, self.latent_size, generator=generator)

    def log_density(self, z_ND: Tensor) -> Tensor:
        return _log_normal(z_ND.double())

    def tensors(self) -> dict[str, Tensor]:
        return {"latent_size": torch.tensor(self.latent_size)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(int(tensors["latent_size"]))


class Gaussian(Prior):
    """The normal distribution with the mean and covariance of given codes.

    Closer to where a model really puts its codes than N(0, I), with the same tools: what
    Ghosh et al. (arXiv 1903.12436) call ex-post density estimation. No direction has less than
    1e-6 of the variance of the largest: one in which the codes do not vary, as there are with
    N <= D, would make every density 0 or infinite.
    """

    name, fewest = "gaussian", 2

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
        return _log_normal(self.whiten(z_ND)) + self.log_whitening

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
        return cls(*(tensors[name] for name in ("mean_D", "axes_DD", "scales_D")))


class Mixture(Prior):
    """A mixture of normal distributions, each with a covariance of its own.

    Fitted by expectation maximisation (scikit-learn's GaussianMixture) in the coordinates that a
    Gaussian whitens.
    """

    name, fewest = "gmm", 2

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
            logs_N.append(weight.log() + _log_normal(noise_DN.T) - log_volume)
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
        parts = (tensors[name] for name in ("weights_K", "means_KD", "roots_KDD"))
        return cls(Gaussian.from_tensors(tensors), *parts)


class Flow(Prior):
    """A normalising flow: a normal distribution bent by coupling layers (zuko).

    Affine coupling (Dinh et al., arXiv 1605.08803) in the coordinates that a Gaussian whitens. A
    little noise on the codes while it learns keeps it from finding thin sheets in few of them; it
    learns until a tenth of the codes, which it does not see, gets no likelier.
    """

    name, fewest = "flow", 20

    LAYERS = 6
    HIDDEN = (256, 256)
    NOISE = 0.1
    STEPS, BATCH, RATE = 4000, 256, 1e-3
    CHECK_EVERY, PATIENCE = 100, 5

    def __init__(self, frame: Gaussian, layers: nn.Module):
        self.frame, self.layers = frame, layers.requires_grad_(False)

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0) -> Self:
        frame = Gaussian.fit(codes_ND)
        generator = Generator().manual_seed(seed)
        white_ND = frame.whiten(codes_ND).float()
        white_ND = white_ND[torch.randperm(len(white_ND), generator=generator)]

        def noisy(rows_BD: Tensor) -> Tensor:
            return rows_BD + cls.NOISE * torch.randn(rows_BD.shape, generator=generator)

        count = len(white_ND) // 10
        unseen_ND, seen_ND = noisy(white_ND[:count]), white_ND[count:]
        layers = cls._layers(white_ND.shape[1], seed)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=cls.RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cls.STEPS)
        best, best_state, best_step = math.inf, copy.deepcopy(layers.state_dict()), 0
        with stage("fitted the flow", cls.STEPS) as advance:
            for step in range(1, cls.STEPS + 1):
                rows_B = torch.randint(len(seen_ND), (cls.BATCH,), generator=generator)
                loss = -layers().log_prob(noisy(seen_ND[rows_B])).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(layers.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                if step % cls.CHECK_EVERY:
                    continue
                advance(cls.CHECK_EVERY)
                with torch.no_grad():
                    found = -layers().log_prob(unseen_ND).mean().item()
                if found < best:
                    best, best_state, best_step = found, copy.deepcopy(layers.state_dict()), step
                elif step - best_step >= cls.PATIENCE * cls.CHECK_EVERY:
                    break
        layers.load_state_dict(best_state)
        return cls(frame, layers)

    @classmethod
    def _layers(cls, latent_size: int, seed: int = 0) -> nn.Module:
        from zuko.flows import MAF

        how: dict[str, Any] = {"passes": 2, "hidden_features": cls.HIDDEN, "randperm": True}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return MAF(latent_size, transforms=cls.LAYERS, **how)

    def draw(self, n: int, generator: Generator) -> Tensor:
        noise_ND = torch.randn(n, len(self.frame.mean_D), generator=generator)
        return self.frame.colour(self.layers().transform.inv(noise_ND))

    def log_density(self, z_ND: Tensor) -> Tensor:
        log_N = self.layers().log_prob(self.frame.whiten(z_ND).float())
        return log_N.double() + self.frame.log_whitening

    def tensors(self) -> dict[str, Tensor]:
        states = {f"layers.{name}": tensor for name, tensor in self.layers.state_dict().items()}
        return self.frame.tensors() | states

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        frame = Gaussian.from_tensors(tensors)
        layers = cls._layers(len(frame.mean_D))
        prefix = "layers."
        layers.load_state_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        )
        return cls(frame, layers)


KINDS: dict[str, type[Prior]] = {kind.name: kind for kind in (Normal, Gaussian, Mixture, Flow)}


def _log_normal(noise_ND: Tensor) -> Tensor:
    """Log density of N(0, I), [N]."""
    return -0.5 * (noise_ND.square() + math.log(2 * math.pi)).sum(-1)
