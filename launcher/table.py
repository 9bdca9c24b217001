"""What `t5vae-launch status` shows of jobs: from their backends, and from their runs' folders."""

import re
import time
from pathlib import Path
from typing import Any

from launcher.backend import State
from launcher.jobs import Job
from t5vae.cluster import attempts
from t5vae.common.errors import UserError, printable
from t5vae.common.files import read_records
from t5vae.common.records import finite
from t5vae.config import read_run

COLUMNS = (
    *("job", "state", "nodes", "step", "loss", "tokens/s", "checkpoint", "restarts", "left", "run"),
    "reason",
)
STEP = re.compile("step-([0-9]+)")
TAIL = 1 << 16  # bytes: more than any line of metrics


def table(jobs: list[Job], states: dict[str, State]) -> str:
    """One line a job, under a line of headings."""
    rows = [COLUMNS, *(_row(job, states[job.id]) for job in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(job: Job, state: State) -> tuple[str, ...]:
    last, steps = last_metrics(job.run), _steps(job.run)
    step, loss, speed = (finite(last.get(key)) for key in ("step", "loss", "tokens_per_second"))
    of = "?" if steps is None else f"{steps:,}"
    word = "COMPLETED" if state.word == "ENDED" and last and step == steps else state.word
    starts = [attempt for attempt in attempts.read(job.run) if attempt.job == job.id]
    return (
        job.id,
        word,
        state.nodes,
        "-" if step is None else f"{step:,}/{of}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if speed is None else f"{speed:,.0f}",
        _checkpoint(job.run),
        str(max(0, len(starts) - 1)),
        state.time_left if state.is_live else "-",
        printable(str(job.run)),
        state.reason,
    )


def last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics; empty before it."""
    records = read_records(run / "metrics.jsonl", tail=TAIL)
    return records[-1] if records else {}


def _steps(run: Path) -> int | None:
    """How many are to be done; None where the run's configuration is of another version."""
    try:
        return read_run(run).train.steps
    except UserError:
        return None


def _checkpoint(run: Path) -> str:
    """The newest checkpoint's step and its age."""
    paths = {
        int(found[1]): path
        for path in (run / "checkpoints").glob("step-*")
        if (found := STEP.fullmatch(path.name))
    }
    if not paths:
        return "-"
    newest = max(paths)
    try:
        age = _age(time.time() - paths[newest].stat().st_mtime)
    except FileNotFoundError:  # a run has deleted it meanwhile
        return f"{newest:,}"
    return f"{newest:,}, {age} ago"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
