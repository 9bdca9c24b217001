"""Priors to sample from: fitted on codes, kept in a file, and read again.

Shapes: N rows, D latent size.
"""

from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS, find
from t5vae.latent.artifacts import damaged, read_tensors, write_tensors
from t5vae.latent.priors.prior import Prior

__all__ = ["Prior", "find_prior", "fit_prior", "load_prior", "save_prior"]

FORMAT_VERSION = 1


def find_prior(name: str) -> type[Prior]:
    """The kind of prior that a name of `t5vae.common.kinds.PRIORS` stands for.

    Raises:
        UserError: for an unknown name.
    """
    if name not in PRIORS:
        raise UserError(f"unknown prior {name!r}; choose one of {', '.join(PRIORS)}")
    return find(PRIORS, name)


def fit_prior(name: str, codes_ND: Tensor, *, seed: int = 0) -> Prior:
    """Fit a prior on codes.

    Args:
        name: one of `t5vae.common.kinds.PRIORS`.
        codes_ND: float [N, D].
        seed: of what is random in a fit; the same seed and codes give the same prior.

    Raises:
        UserError: for an unknown name, too few codes, or one that is not finite.
    """
    kind = find_prior(name)
    if len(codes_ND) < kind.fewest:
        raise UserError(
            f"the prior {name!r} is fitted on codes; {len(codes_ND)} given, at least "
            f"{kind.fewest} needed"
        )
    if not codes_ND.isfinite().all():
        raise UserError(f"the prior {name!r} is fitted on codes; some given are not finite")
    return kind.fit(codes_ND, seed)


def save_prior(name: str, prior: Prior, path: Path, made_from: dict[str, Any]) -> None:
    """Keep a prior in a file, with its name and what it was made from, fit for JSON.

    Raises:
        UserError: if that fails.
    """
    write_tensors(path, prior.tensors(), {"prior": name}, FORMAT_VERSION, made_from)


def load_prior(path: Path, made_from: dict[str, Any], latent_size: int) -> Prior | None:
    """The prior kept in a file; None if there is none, or it was made from something else.

    Args:
        path: the file.
        made_from: as it was kept.
        latent_size: D.

    Raises:
        UserError: the file is damaged.
    """
    kept = read_tensors(path, FORMAT_VERSION, made_from)
    if kept is None:
        return None
    tensors, about = kept
    try:
        prior: Prior = find(PRIORS, about["prior"]).from_tensors(tensors)
        drawn_1D = prior.draw(1, Generator().manual_seed(0))
        if drawn_1D.shape != (1, latent_size):
            raise ValueError(f"it draws codes of another size than {latent_size}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from None
    return prior
