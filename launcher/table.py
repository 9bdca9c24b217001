"""What `t5vae-launch status` shows of jobs: from SLURM, and from their runs' folders."""

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from launcher.jobs import Job, State, read_lines

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
    done = bool(last) and last["step"] == steps
    word = "COMPLETED" if state.word == "ENDED" and done else state.word
    attempts = [a for a in read_lines(job.run / "attempts.jsonl") if a["job"] == job.id]
    return (
        job.id,
        word,
        state.nodes,
        f"{last['step']:,}/{steps:,}" if last else "-",
        f"{last['loss']:.4f}" if last and last["loss"] is not None else "-",
        f"{last['tokens_per_second']:,.0f}" if last else "-",
        _checkpoint(job.run),
        str(max(0, len(attempts) - 1)),
        state.time_left if state.is_live else "-",
        str(job.run),
        state.reason if state.word == "PENDING" and state.reason != "None" else "",
    )


def last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics; empty before it."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else {}


def _steps(run: Path) -> int:
    path = run / "config.yaml"
    return yaml.safe_load(path.read_text())["train"]["steps"] if path.exists() else 0


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
