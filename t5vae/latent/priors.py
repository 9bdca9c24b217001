"""Priors: what codes are drawn from, and how dense they lie.

Shapes: N rows, D latent size, K components of a mixture.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor, nn

from shards.errors import UserError
from shards.progress import stage
from t5vae.latent.kept import read_tensors, write_tensors

FORMAT_VERSION = 1
PRIORS = ("normal", "gaussian", "gmm", "flow")


def fit_prior(name: str, codes_ND: Tensor, *, seed: int = 0) -> "Prior":
    """Fit a prior on codes.

    Args:
        name: one of `PRIORS`.
        codes_ND: float [N, D].
        seed: of what is random in a fit; the same seed and codes give the same prior.

    Raises:
        UserError: for an unknown name, or too few codes.
    """
    if name == "normal":
        return Normal(codes_ND.shape[1])
    if name == "gaussian":
        return Gaussian(codes_ND)
    if name == "gmm":
        return Mixture.fit(codes_ND, seed)
    if name == "flow":
        return Flow.fit(codes_ND, seed)
    raise UserError(f"unknown prior {name!r}; choose one of {', '.join(PRIORS)}")


def save_prior(prior: "Prior", path: Path, made_from: dict[str, Any]) -> None:
    """Keep a prior in a file.

    Args:
        prior: what `fit_prior` returned.
        path: the file; its folder is made if need be.
        made_from: what it was fitted on, fit for JSON.
    """
    about = {"format_version": FORMAT_VERSION, "prior": prior.name, "made_from": made_from}
    write_tensors(path, prior.tensors(), about)


def load_prior(path: Path, made_from: dict[str, Any]) -> "Prior | None":
    """The prior kept in a file; None if there is none, or it was made from something else.

    Raises:
        UserError: the file is damaged.
    """
    kept = read_tensors(path)
    if kept is None:
        return None
    tensors, about = kept
    if about.get("format_version") != FORMAT_VERSION or about.get("made_from") != made_from:
        return None
    kinds: dict[str, type[Prior]] = {k.name: k for k in (Normal, Gaussian, Mixture, Flow)}
    return kinds[about["prior"]].from_tensors(tensors)


class Prior(ABC):
    """A distribution of codes."""

    name: ClassVar[str]

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
        """The prior that `tensors` was called on."""


def _log_normal(noise_ND: Tensor) -> Tensor:
    """Log density of N(0, I), [N]."""
    return -0.5 * (noise_ND.square() + math.log(2 * math.pi)).sum(-1)


class Normal(Prior):
    """The prior of training, N(0, I)."""

    name = "normal"

    def __init__(self, latent_size: int):
        self.latent_size = latent_size

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

    Args:
        codes_ND: float [N, D], N >= 2.

    Raises:
        UserError: for fewer codes.
    """

    name = "gaussian"

    def __init__(self, codes_ND: Tensor):
        _need(self.name, codes_ND, 2)
        codes_ND = codes_ND.double()
        self.mean_D = codes_ND.mean(0)
        variances_D, self.axes_DD = torch.linalg.eigh(
            torch.cov(codes_ND.T).reshape(2 * codes_ND.shape[1:])
        )
        floor = 1e-6 * variances_D[-1].item() or 1e-6
        self.scales_D = variances_D.clamp(min=floor).sqrt()

    def draw(self, n: int, generator: Generator) -> Tensor:
        shape = n, len(self.mean_D)
        return self.colour(torch.randn(shape, generator=generator, dtype=torch.float64)).float()

    def log_density(self, z_ND: Tensor) -> Tensor:
        return _log_normal(self.whiten(z_ND)) + self.log_whitening

    def whiten(self, z_ND: Tensor) -> Tensor:
        """Codes to coordinates of mean 0 and covariance I, float64 [N, D]."""
        return (z_ND.double() - self.mean_D) @ self.axes_DD / self.scales_D

    def colour(self, white_ND: Tensor) -> Tensor:
        """The inverse of `whiten`."""
        return self.mean_D + (white_ND.double() * self.scales_D) @ self.axes_DD.T

    @property
    def log_whitening(self) -> Tensor:
        """Log of the factor by which `whiten` changes volumes."""
        return -self.scales_D.log().sum()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean_D": self.mean_D, "axes_DD": self.axes_DD, "scales_D": self.scales_D}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        prior = cls.__new__(cls)
        for name in ("mean_D", "axes_DD", "scales_D"):
            setattr(prior, name, tensors[name])
        return prior


class Mixture(Prior):
    """A mixture of normal distributions, in the coordinates that a Gaussian whitens."""

    name = "gmm"

    def __init__(self, frame, weights_K, means_KD, roots_KDD):
        self.frame, self.weights_K, self.means_KD = frame, weights_K, means_KD
        self.roots_KDD = roots_KDD

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0, components=8, kind="full") -> Self:
        from sklearn.mixture import GaussianMixture

        frame = Gaussian(codes_ND)
        fitted = GaussianMixture(components, covariance_type=kind, random_state=seed)
        fitted.fit(frame.whiten(codes_ND).numpy())
        means_KD = torch.from_numpy(fitted.means_)
        K, D = means_KD.shape
        cov = torch.from_numpy(fitted.covariances_)
        if kind == "diag":
            cov = torch.diag_embed(cov)
        if kind == "tied":
            cov = cov.expand(K, D, D)
        return cls(frame, torch.from_numpy(fitted.weights_), means_KD, torch.linalg.cholesky(cov))

    def draw(self, n: int, generator: Generator) -> Tensor:
        which_N = torch.multinomial(self.weights_K, n, replacement=True, generator=generator)
        noise_ND = torch.randn(n, self.means_KD.shape[1], generator=generator, dtype=torch.float64)
        white_ND = torch.empty_like(noise_ND)
        for k, (mean_D, root_DD) in enumerate(zip(self.means_KD, self.roots_KDD, strict=True)):
            rows = which_N == k
            white_ND[rows] = mean_D + noise_ND[rows] @ root_DD.T
        return self.frame.colour(white_ND).float()

    def log_density(self, z_ND: Tensor) -> Tensor:
        white_ND = self.frame.whiten(z_ND)
        logs = []
        for w, mean_D, root_DD in zip(self.weights_K, self.means_KD, self.roots_KDD, strict=True):
            noise_DN = torch.linalg.solve_triangular(
                root_DD, (white_ND - mean_D).T, upper=False
            )
            logs.append(_log_normal(noise_DN.T) - root_DD.diagonal().log().sum() + w.log())
        return torch.stack(logs).logsumexp(0) + self.frame.log_whitening

    def tensors(self) -> dict[str, Tensor]:
        return self.frame.tensors() | {"weights_K": self.weights_K, "means_KD": self.means_KD, "roots_KDD": self.roots_KDD}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(Gaussian.from_tensors(tensors), tensors["weights_K"], tensors["means_KD"], tensors["roots_KDD"])


class Flow(Prior):
    """A normalising flow."""

    name = "flow"

    def __init__(self, frame, layers):
        self.frame, self.layers = frame, layers

    @classmethod
    def fit(cls, codes_ND: Tensor, seed: int = 0, kind="MAF", noise=0.1, transforms=4, hidden=(256,256),
            steps=2000, batch=256, lr=1e-3, randperm=True, decay=0.0, log=None) -> Self:
        import copy
        from zuko import flows
        frame = Gaussian(codes_ND)
        g = Generator().manual_seed(seed)
        white = frame.whiten(codes_ND).float()
        order = torch.randperm(len(white), generator=g)
        held, rest = white[order[: len(white)//10]], white[order[len(white)//10:]]
        D = white.shape[1]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            flow = getattr(flows, kind)(D, transforms=transforms, passes=2, hidden_features=hidden, randperm=randperm)
        prior = cls(frame, flow)
        opt = torch.optim.AdamW(flow.parameters(), lr=lr, weight_decay=decay)
        sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        held = held + noise * torch.randn(held.shape, generator=g)
        best, kept, bad = math.inf, None, 0
        for step in range(steps):
            rows = torch.randint(len(rest), (batch,), generator=g)
            x = rest[rows]
            x = x + noise * torch.randn(x.shape, generator=g)
            loss = -flow().log_prob(x).mean()
            opt.zero_grad(); loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            opt.step(); sched.step()
            if (step + 1) % 100 == 0:
                with torch.no_grad():
                    val = -flow().log_prob(held).mean().item()
                if log: log(step+1, loss.item()/D, val/D)
                if val < best:
                    best, kept, bad = val, copy.deepcopy(flow.state_dict()), 0
                else:
                    bad += 1
                    if bad == 5: break
        flow.load_state_dict(kept)
        flow.requires_grad_(False)
        return prior

    @torch.no_grad()
    def draw(self, n: int, generator: Generator) -> Tensor:
        noise_ND = torch.randn(n, len(self.frame.mean_D), generator=generator)
        return self.frame.colour(self.layers().transform.inv(noise_ND)).float()

    @torch.no_grad()
    def log_density(self, z_ND: Tensor) -> Tensor:
        lp = self.layers().log_prob(self.frame.whiten(z_ND).float()).double()
        return lp + self.frame.log_whitening

    def tensors(self) -> dict[str, Tensor]:
        return self.frame.tensors()

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        raise NotImplementedError


def _need(name: str, codes_ND: Tensor, least: int) -> None:
    if len(codes_ND) < least:
        raise UserError(
            f"the prior {name!r} is fitted on codes; {len(codes_ND)} given, "
            f"at least {least} needed"
        )
