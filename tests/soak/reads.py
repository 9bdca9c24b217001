"""What a soak reads back: lines of a log, sequences that ranks read, steps of a run."""

import json
from pathlib import Path
from typing import Any

from t5vae.metrics.reading import read_metrics
from tests.launching import lines_written


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file."""
    text = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in text if line.endswith("\n")]


class Reads:
    """What the ranks of one start read.

    Args:
        world: ranks.
        folder: what they read is there.
    """

    def __init__(self, world: int, folder: Path):
        self.world, self.folder = world, folder

    def reads(self) -> list[tuple[int, int, list[int]]]:
        """Step, rank and sequences of all that its ranks read, each rank's in turn."""
        found = []
        for rank in range(self.world):
            for line in lines(self.folder / f"sequences-{rank}.jsonl"):
                found.append((line["step"], rank, line["sequences"]))
        return found

    @property
    def first(self) -> int | None:
        """The first step that it reads for; None where it has not come so far."""
        return min((step for step, _, _ in self.reads()), default=None)

    @property
    def last(self) -> int:
        """The step that rank 0 is in; 0 before the first."""
        return max((step for step, rank, _ in self.reads() if rank == 0), default=0)


def last_read(folder: Path) -> float:
    """When a start read sequences last; only one can at a time."""
    return max((file.stat().st_mtime for file in folder.glob("sequences-*.jsonl")), default=0.0)


def served(starts: list[Reads]) -> dict[int, dict[int, list[int]]]:
    """The sequences of each step by rank; a step that was done again counts as done last."""
    read: dict[int, dict[int, list[int]]] = {}
    for start in starts:
        if (first := start.first) is None:
            continue
        read = {step: ranks for step, ranks in read.items() if step < first}
        for step, rank, sequences in start.reads():
            read.setdefault(step, {})[rank] = sequences
    return read


def is_cut_short(own: str, wanted: str) -> bool:
    """Whether a step lacks but its evaluation, which a run that is told to stop leaves out."""
    found, whole = json.loads(own), json.loads(wanted)
    lacking = whole.keys() - found.keys()
    return all(key.startswith("eval/") for key in lacking) and found == {
        key: value for key, value in whole.items() if key not in lacking
    }


def last_step(run: Path) -> int:
    """The last step that a run has logged."""
    return read_metrics(run)[-1]["step"] if lines_written(run) else 0
