"""The runs of a folder: how far each is, by the last lines of its metrics."""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from t5vae.common.errors import UserError, printable
from t5vae.common.files import read_records, reading
from t5vae.common.records import finite
from t5vae.metrics.reading import METRICS, metrics_file

State = Literal["finished", "training", "stopped", "damaged"]

TAIL = 1 << 16  # bytes: dozens of lines
OWN = {"checkpoints", "export", "jobs", "logs", "samples", "tensorboard", "wandb"}  # of a run
PATIENCE = 60.0  # seconds without a line until a run may have stopped
INTERVALS = 5  # the usual times between two lines that it may be silent
STYLES = {"finished": "green", "training": "cyan", "stopped": "yellow", "damaged": "red"}


@dataclass(frozen=True)
class Row:
    """A run; None for what its lines do not say.

    Attributes:
        run: its folder.
        steps: how many it is to do.
        loss: of the last line; None where that was not finite.
        checkpoint: the step of the newest one; 0 for none.
        updated: when the last line was written, in Unix seconds.
        problem: what is wrong with its metrics.
    """

    run: str
    state: State
    updated: float
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    checkpoint: int | None = None
    problem: str | None = None


def list_runs(folder: str) -> list[Row]:
    """The runs at and below a folder, at any depth; the one that wrote last comes last.

    Raises:
        UserError: there is none.
    """
    rows = [_row(path) for path in _find(folder)]
    if not rows:
        raise UserError(f"no run in {folder}: there is no {METRICS} at or below it")
    return sorted(rows, key=lambda row: (row.updated, row.run))


def _find(folder: str) -> Iterator[Path]:
    """Runs' folders. Links are followed, since runs often lie on another disk, each place once."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(path)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        if METRICS in files or METRICS in folders:
            folders[:] = set(folders) - OWN - {METRICS}
            yield Path(path)


def _row(run: Path) -> Row:
    path = metrics_file(run)
    written = 0.0
    try:
        with reading(str(path)):
            written = path.stat().st_mtime
        lines = read_records(path, tail=TAIL) or read_records(path)
        if lines and finite(lines[-1].get("step")) is None:
            raise UserError(f"{path} is damaged: its last line has no step")
    except UserError as error:
        return Row(str(run), "damaged", written, problem=str(error))
    last = {key: finite(value) for key, value in lines[-1].items()} if lines else {}
    updated = last.get("time") or written
    step, steps = last.get("step"), last.get("steps")
    return Row(
        run=str(run),
        state="finished" if lines and step == steps else _pulse(lines, time.time() - updated),
        updated=updated,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        checkpoint=last.get("checkpoint"),
    )


def _pulse(lines: list[dict[str, Any]], age: float) -> State:
    """Whether a run goes on, by the seconds since its last line."""
    times = [at for line in lines if (at := finite(line.get("time"))) is not None]
    between = [later - earlier for earlier, later in pairwise(times)]
    usual = statistics.median(between) if between else 0.0
    return "training" if age < max(PATIENCE, INTERVALS * usual) else "stopped"


def table(rows: list[Row]) -> Table:
    """For people: a line a run."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("run", overflow="fold")
    shown.add_column("state")
    for name in ("step", "loss", "tokens/s", "checkpoint", "updated"):
        shown.add_column(name, justify="right")
    for row in rows:
        of = "?" if row.steps is None else f"{row.steps:,}"
        speed = row.tokens_per_second
        shown.add_row(
            Text(printable(row.run)),
            Text(row.state, STYLES[row.state]),
            "-" if row.step is None else f"{row.step:,}/{of}",
            "-" if row.loss is None else f"{row.loss:.4f}",
            "-" if speed is None else f"{speed:,.0f}",
            f"{row.checkpoint:,}" if row.checkpoint else "-",
            f"{_age(time.time() - row.updated)} ago",
        )
    return shown


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
