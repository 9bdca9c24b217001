"""What is drawn, whatever draws it: which keys, over which scales, and how few points suffice."""

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.ticker import EngFormatter

from t5vae.common.errors import UserError, printable
from t5vae.common.kinds import TERMS
from t5vae.metrics.reading import HELD_OUT, METRICS, Axis, Curve, Event, Run, read_run

FALLING = {  # towards zero, by orders of magnitude, as terms of the objective are
    *("loss", "reconstruction", "nats_per_token", "nats_per_sequence", "grad_norm"),
    *("epps_pulley_slices", "epps_pulley_axes"),
}
WIDE = 20  # the ratio of a key's largest value to its smallest from which a linear scale hides
X_LABELS = {"step": "step", "consumed": "sequences", "hours": "hours"}
NEAREST = 3  # keys that are named in place of an unknown one


@dataclass(frozen=True)
class Scale:
    """Of a panel's values; `asinh` is linear up to `width` on both sides of 0, and then as log.

    Attributes:
        low: the least finite value.
        high: the largest.
    """

    kind: Literal["linear", "log", "asinh"]
    low: float
    high: float
    width: float = 0.0

    @property
    def ticks(self) -> list[float]:
        """Round values, for a scale that is not linear: powers of ten, or also 2 and 5 of them."""
        least = self.width or self.low
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 3 else (1,)
        powers = range(first, last + 1, 1 + (last - first) // 8)
        round_ones = [factor * 10.0**power for power in powers for factor in factors]
        zero = [0.0] if self.kind == "asinh" else []
        return zero + [value for value in round_ones if least <= value <= self.high]


@dataclass(frozen=True)
class Line:
    """A run in a panel.

    Attributes:
        curve: of the training; None for a key of the evaluations.
        held_out: the same key of the evaluations.
        events: none for a key of the evaluations.
    """

    curve: Curve | None
    held_out: Curve | None
    events: list[Event]


@dataclass(frozen=True)
class Panel:
    """A key of all runs; without a scale where it has no finite value."""

    key: str
    scale: Scale | None
    lines: list[Line]


@dataclass(frozen=True)
class Drawing:
    """All panels, and the runs' names: as short as tells them apart."""

    panels: list[Panel]
    names: list[str]
    x_label: str


def shown() -> tuple[str, ...]:
    """The keys that are drawn where none are asked for."""
    return (
        *("loss", "nats_per_token", *TERMS, "eval/exact_match", "eval/valid"),
        *("eval/interpolation_validity", "eval/shuffled_gap", "eval/participation_ratio"),
    )


def plan(runs: list[str], keys: list[str] | None, x: Axis) -> Drawing:
    """Read runs, and choose what is drawn of them.

    Args:
        runs: their folders, or copies of their metrics.
        keys: a panel each; None for those of `shown` that are there.
        x: what the curves run over.

    Raises:
        UserError: a run has no metrics or damaged ones, or no run has a key.
    """
    asked = list(dict.fromkeys(keys or shown()))
    wanted = {*asked, *(HELD_OUT + key for key in asked)}
    read = [read_run(run, wanted, x) for run in dict.fromkeys(runs)]
    known = set().union(*(run.keys for run in read))
    for key in keys or ():
        if key not in known:
            raise UserError(f"no run has the key {key}; {_nearest(key, known)}")
    drawn = [key for key in asked if key in known]
    if not drawn:
        raise UserError(f"no run has any of {', '.join(shown())}; choose by --key: {_all(known)}")
    return Drawing([_panel(key, read) for key in drawn], _names(read), X_LABELS[x])


def _nearest(key: str, known: set[str]) -> str:
    leaf = key.rpartition("/")[2]
    near = [name for name in sorted(known) if name.rpartition("/")[2] == leaf]
    near += difflib.get_close_matches(key, sorted(known), n=NEAREST)
    near += [name for name in sorted(known) if leaf in name]
    near = list(dict.fromkeys(near))[:NEAREST]
    return f"did you mean {', '.join(near)}?" if near else f"there are {_all(known)}"


def _all(known: set[str]) -> str:
    return ", ".join(sorted(known))


def _names(runs: list[Run]) -> list[str]:
    """Their paths, without the folders that all share."""
    paths = [Path(os.path.abspath(run.name)) for run in runs]
    paths = [path.parent if path.name == METRICS else path for path in paths]
    shared = os.path.commonpath([path.parent for path in paths])
    return [printable(os.path.relpath(path, shared)) for path in paths]


def _panel(key: str, runs: list[Run]) -> Panel:
    if key.startswith(HELD_OUT):
        lines = [Line(None, run.curves.get(key), []) for run in runs]
    else:
        lines = [
            Line(run.curves.get(key), run.curves.get(HELD_OUT + key), run.events) for run in runs
        ]
    curves = [curve for line in lines for curve in (line.curve, line.held_out) if curve]
    return Panel(key, _scale(key, curves), lines)


def _scale(key: str, curves: Iterable[Curve]) -> Scale | None:
    values = np.concatenate([curve.y for curve in curves])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if key.removeprefix(HELD_OUT) in FALLING | set(TERMS):
        if 0 < low <= high / WIDE:
            return Scale("log", low, high)
        width = max(-low, high / WIDE**2)  # an estimate without bias goes below 0 as well
        if low <= 0 and high > WIDE * width:
            return Scale("asinh", low, high, width)
    return Scale("linear", low, high)


def tick_label(value: float) -> str:
    """0.05, 250, 20k, 1.5M."""
    return EngFormatter(sep="")(value) if 1e3 <= abs(value) < 1e15 else f"{value:g}"


def thin(curve: Curve, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """A curve that looks the same when drawn: of each bin its first, lowest, highest value and gap.

    Args:
        curve: of any length.
        bins: how many can be told apart.

    Returns:
        x and y, each of at most about 5 bins; NaN at gaps.
    """
    x, y = curve.x, curve.y
    size = len(y) // bins
    if size <= 4:
        return x, y
    whole = len(y) - len(y) % size
    binned = y[:whole].reshape(-1, size)
    gap = np.isnan(binned)
    lowest = np.where(gap, np.inf, binned).argmin(axis=1)
    highest = np.where(gap, -np.inf, binned).argmax(axis=1)
    picked = np.stack([np.zeros_like(lowest), lowest, highest, gap.argmax(axis=1)])
    picked += np.arange(len(binned)) * size
    index = np.unique(np.concatenate([picked.ravel(), np.arange(whole, len(y))]))
    return x[index], y[index]


def trend(curve: Curve, bins: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The median of each bin; None for a curve too short to need one.

    Returns:
        x and y, each [bins] or a few more; NaN where half of a bin is.
    """
    size = len(curve.y) // bins
    if size <= 2:
        return None
    whole = len(curve.y) - len(curve.y) % size
    x = curve.x[:whole].reshape(-1, size)
    y = curve.y[:whole].reshape(-1, size)
    gap = np.isnan(y)
    middle = np.ma.median(np.ma.masked_array(y, gap), axis=1).filled(np.nan)
    return x.mean(axis=1), np.where(2 * gap.sum(axis=1) >= size, np.nan, middle)


def alone(y: np.ndarray) -> np.ndarray:
    """Where a value has no neighbour, so that no line shows it; bool [N]."""
    gap = np.isnan(np.pad(y, 1, constant_values=np.nan))
    return ~gap[1:-1] & gap[:-2] & gap[2:]


def is_skip(event: Event) -> bool:
    """Whether an event is a step that was skipped; else it is a spike."""
    return "skipped" in event.text
