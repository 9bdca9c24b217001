"""Curves out of metrics.jsonl: one pass over a file, of which the wanted columns alone are kept."""

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from t5vae.common.errors import UserError
from t5vae.common.files import iter_records, read_records
from t5vae.common.records import finite

Axis = Literal["step", "consumed", "hours"]

METRICS = "metrics.jsonl"
HELD_OUT = "eval/"
EVENT, POSITION = "event", "position"  # what went wrong in a step, and where its batch begins


@dataclass(frozen=True)
class Curve:
    """A key's values over the lines that have it.

    Attributes:
        x: float64 [N].
        y: float64 [N], NaN where a value was not finite.
    """

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Event:
    """What was told of a step: a spike, or that it was skipped."""

    x: float
    text: str


@dataclass(frozen=True)
class Run:
    """What is drawn of a run.

    Attributes:
        name: as it was given.
        keys: all that its lines have.
        curves: of the keys that were asked for and are there.
    """

    name: str
    keys: set[str]
    curves: dict[str, Curve]
    events: list[Event]


def metrics_file(run: Path) -> Path:
    """A run is its folder, or a copy of its metrics under any name."""
    return run if run.is_file() else run / METRICS


def read_run(run: str, keys: set[str], x: Axis) -> Run:
    """A run's curves.

    Args:
        run: its folder, or its metrics.
        keys: the curves that are wanted.
        x: what they run over; hours are those since the first line.

    Raises:
        UserError: there are no metrics, or they are damaged.
    """
    path = metrics_file(Path(run))
    if not path.exists():
        raise UserError(f"{run} is no run: it has no {METRICS}")
    column = "time" if x == "hours" else x
    found: set[str] = set()
    xs: dict[str, array[float]] = defaultdict(lambda: array("d"))
    ys: dict[str, array[float]] = defaultdict(lambda: array("d"))
    events: list[Event] = []
    start = None
    for line in iter_records(path):
        at = finite(line.get(column))
        if at is None:
            raise UserError(f"{path} has lines without {column}")
        if x == "hours":
            start = at if start is None else start
            at = (at - start) / 3600
        found |= line.keys()
        for key in keys & line.keys():
            value = line[key]
            xs[key].append(at)
            ys[key].append(math.nan if finite(value) is None else value)
        if EVENT in line:
            events.append(Event(at, str(line[EVENT])))
    if not found:
        raise UserError(f"{path} is empty: the run has not logged a step yet")
    curves = {key: Curve(np.asarray(xs[key]), np.asarray(ys[key])) for key in xs}
    return Run(run, found - {EVENT, POSITION}, curves, events)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return read_records(folder / METRICS)
