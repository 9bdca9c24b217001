"""What `t5vae-launch status` shows of jobs: from their backends, and from their runs' folders."""

import time
from pathlib import Path
from typing import Any

from launcher.backend import State
from launcher.jobs import Job
from t5vae.cluster.attempts import ATTEMPTS
from t5vae.common.errors import UserError
from t5vae.common.files import read_records
from t5vae.config import read_run

COLUMNS = (
    *("job", "state", "nodes", "step", "loss", "tokens/s", "checkpoint", "restarts", "left", "run"),
    "reason",
)
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
    of = "?" if steps is None else f"{steps:,}"
    done = bool(last) and last["step"] == steps
    word = "COMPLETED" if state.word == "ENDED" and done else state.word
    attempts = [a for a in read_records(job.run / ATTEMPTS) if a["job"] == job.id]
    return (
        job.id,
        word,
        state.nodes,
        f"{last['step']:,}/{of}" if last else "-",
        f"{last['loss']:.4f}" if last and last["loss"] is not None else "-",
        f"{last['tokens_per_second']:,.0f}" if last else "-",
        _checkpoint(job.run),
        str(max(0, len(attempts) - 1)),
        state.time_left if state.is_live else "-",
        str(job.run),
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
    names = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    steps = [int(name) for name in names if name.isdigit()]
    if not steps:
        return "-"
    path = run / "checkpoints" / f"step-{max(steps):08d}"
    return f"{max(steps):,}, {_age(time.time() - path.stat().st_mtime)} ago"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
