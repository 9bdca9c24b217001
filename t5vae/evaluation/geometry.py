"""How codes lie, beside N(0, I): in figures, and in what a picture of them needs.

Shapes: N codes, D latent size.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5vae.evaluation import metrics
from t5vae.objective import mmd, sliced_epps_pulley

BINS = np.linspace(-4, 4, 41)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


FIGURES: dict[str, Callable[[Tensor], float]] = {
    "mmd": lambda z_ND: mmd(z_ND, kernel="imq", prior="normal", estimator="u").item(),
    "sliced_wasserstein": metrics.sliced_wasserstein,
    "epps_pulley_slices": lambda z_ND: sliced_epps_pulley(z_ND, axes=False).item(),
    "epps_pulley_axes": lambda z_ND: sliced_epps_pulley(z_ND, slices=0).item(),
    "mean_square_norm": metrics.mean_square_norm,
    "participation_ratio": metrics.participation_ratio,
    "active_dimensions": metrics.active_dimensions,
}


def geometry(z_ND: Tensor) -> dict[str, float]:
    """Figures of codes [N, D]; see `evaluate`. NaN stands for one that they do not have, as codes
    that are not finite have none."""
    finite = bool(z_ND.isfinite().all())
    return {name: _figure(of, z_ND) if finite else math.nan for name, of in FIGURES.items()}


def _figure(of: Callable[[Tensor], float], z_ND: Tensor) -> float:
    try:
        return of(z_ND)
    except (ArithmeticError, RuntimeError, ValueError):
        return math.nan


def portrait(z_ND: Tensor) -> dict[str, Any]:
    """What pictures of codes [N, D] need, fit for JSON.

    Returns:
        eigenvalues: of their covariance, the largest first, D of them.
        histogram: of all coordinates together: `edges` and, between them, `density`; what lies
            beyond the edges counts for none.
        quantiles: for each of `levels` the D coordinates' quantiles, by rising variance.
        map: `x` and `y`, N each, on the two directions of most variance, and the `share` of the
            variance that both have.
    """
    z = z_ND.double()
    centred = z - z.mean(0)
    eigenvalues, axes = torch.linalg.eigh(centred.T @ centred / len(z))
    x, y = (centred @ axes[:, -2:]).flip(1).T if z.shape[1] > 1 else (centred[:, 0], 0 * z[:, 0])
    counts, _ = np.histogram(z.numpy(), BINS)
    by_variance = z[:, z.var(0, correction=0).argsort()].numpy()
    total = eigenvalues.sum().item()
    return {
        "eigenvalues": _short(eigenvalues.flip(0)),
        "histogram": {
            "edges": _short(BINS),
            "density": _short(counts / z.numel() / np.diff(BINS)),
        },
        "quantiles": {
            "levels": list(QUANTILES),
            "values": [_short(row) for row in np.quantile(by_variance, QUANTILES, axis=0)],
        },
        "map": {
            "x": _short(x),
            "y": _short(y),
            "share": eigenvalues[-2:].sum().item() / total if total > 0 else 0.0,
        },
    }


def _short(values: Any) -> list[float]:
    """Numbers to four decimals, which a picture does not tell from more."""
    return [round(float(value), 4) for value in values]
