"""Intervals: how far a figure would move if other items had been drawn.

Shapes: N items, D latent size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

LEVEL = 0.95
REPEATS = 1000
HALVES = 100  # half samples of codes, whose figures cost more

Interval = list[float]


class Ratio(float):
    """sum(parts) / sum(whole) over N items drawn independently: a float that remembers its items.

    A mean is the ratio to as many ones, a ratio of nothing is 0.

    Args:
        parts: float [N].
        whole: float [N]; default all ones.
    """

    parts_N: np.ndarray
    whole_N: np.ndarray

    def __new__(cls, parts: ArrayLike, whole: ArrayLike | None = None) -> Self:
        parts_N = np.asarray(parts, dtype=np.float64)
        whole_N = np.ones_like(parts_N) if whole is None else np.asarray(whole, dtype=np.float64)
        total = whole_N.sum()
        ratio = super().__new__(cls, parts_N.sum() / total if total else 0.0)
        ratio.parts_N, ratio.whole_N = parts_N, whole_N
        return ratio

    def interval(self, rng: np.random.Generator) -> Interval:
        """[low, high] that holds 95 % of what the items drawn again give: the percentile bootstrap
        (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). A share that is 0 or
        1 has an interval without width, although more items might have moved it."""
        drawn = []
        for _ in range(REPEATS):
            rows_N = rng.integers(len(self.parts_N), size=len(self.parts_N))
            whole = self.whole_N[rows_N].sum()
            drawn.append(self.parts_N[rows_N].sum() / whole if whole else 0.0)
        tail = (1 - LEVEL) / 2
        return np.quantile(drawn, [tail, 1 - tail]).tolist()


def intervals(report: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The intervals of all ratios in a nested dictionary, under the same names."""
    found: dict[str, Any] = {}
    for name, value in report.items():
        if isinstance(value, Ratio):
            found[name] = value.interval(rng)
        elif isinstance(value, dict) and (inside := intervals(value, rng)):
            found[name] = inside
    return found


def half_sampled(
    figures: Callable[[Tensor], dict[str, float]], z_ND: Tensor, rng: np.random.Generator
) -> dict[str, Interval]:
    """Intervals of figures of codes that are no ratios of sums: the value and 1.96 standard
    deviations of what random halves of the codes give.

    Items drawn twice, as the bootstrap has them, look like dependence between codes; halves drawn
    without replacement do not, and vary as much (the delete-d jackknife, d = N/2: Shao and Wu,
    Annals of Statistics 17, 1989).

    Args:
        figures: of codes [n, D], by name.
        z_ND: the codes, N >= 4.
        rng: of the halves.
    """
    halves: Sequence[dict[str, float]] = [
        figures(z_ND[rng.permutation(len(z_ND))[: len(z_ND) // 2]]) for _ in range(HALVES)
    ]
    found = {}
    for name, value in figures(z_ND).items():
        spread = 1.96 * float(np.std([half[name] for half in halves], ddof=1))
        found[name] = [value - spread, value + spread]
    return found
