"""How codes lie, beside N(0, I): in figures, and in what a picture of them needs.

Shapes: N codes, D latent size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from t5vae.evaluation import metrics
from t5vae.objective import mmd, sliced_epps_pulley

BINS = np.linspace(-4, 4, 41)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def geometry(z_ND: Tensor) -> dict[str, float]:
    """Figures of codes [N, D]; see `evaluate`."""
    return {
        "mmd": mmd(z_ND, kernel="imq", prior="normal", estimator="u").item(),
        "sliced_wasserstein": metrics.sliced_wasserstein(z_ND),
        "epps_pulley_slices": sliced_epps_pulley(z_ND, axes=False).item(),
        "epps_pulley_axes": sliced_epps_pulley(z_ND, slices=0).item(),
        "mean_square_norm": metrics.mean_square_norm(z_ND),
        "participation_ratio": metrics.participation_ratio(z_ND),
        "active_dimensions": metrics.active_dimensions(z_ND),
    }


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
