"""train.py under faults.c: ranks as `_slow_saves.py serve` forks them, with storage that fails.

The environment variable SLOW_SAVES holds a JSON object here too:

    record: a folder; faults.c writes to `RANK.calls` there.
    trace: whether it writes of all calls, not of those alone that fail.
    faults: {phase, rank, operation, path, error, after, times}: what fails on a rank (null: on
        all) from when a phase first begins; the rest is as faults.c says, but that `error` is a
        name, or "hang".

The phases are start (from when the ranks have met), resume, step, evaluation and save.
"""

import ctypes
import errno
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.training import _slow_saves

HANG = -1


class Phases:
    """Tells faults.c where in a run this rank is, and arms what is to fail there."""

    def __init__(self, faults: list[dict[str, Any]]):
        self.faults, self.library = faults, ctypes.CDLL(None)
        self.now, self.names = "before", dict[str, bytes]()

    def enter(self, phase: str) -> None:
        """Begin a phase that lasts until another begins."""
        self._name(phase)
        due = [fault for fault in self.faults if fault["phase"] == phase]
        self.faults = [fault for fault in self.faults if fault not in due]
        for fault in due:
            error = HANG if fault["error"] == "hang" else getattr(errno, fault["error"])
            where = (fault["operation"].encode(), fault["path"].encode())
            self.library.faults_add(*where, error, fault["after"], fault["times"])

    def entered_by(self, owner: Any, name: str, phase: str, *, returns: bool = True) -> None:
        """Let a function of the product be a phase, or the beginning of one."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **more: Any) -> Any:
            before = self.now
            self.enter(phase)
            try:
                return function(*args, **more)
            finally:
                if returns:
                    self._name(before)

        setattr(owner, name, watched)

    def _name(self, phase: str) -> None:
        self.now = phase
        self.library.faults_phase(self.names.setdefault(phase, phase.encode()))


def run(arguments: list[str]) -> int:
    """train.py's `main`, with faults."""
    from t5vae.checkpoint.checkpoints import Checkpoints
    from t5vae.training import loop, start
    from t5vae.training.feed import Feed
    from t5vae.training.main import main
    from t5vae.training.midrun import MidRunEvaluation

    asked, rank = json.loads(os.environ["SLOW_SAVES"]), os.environ["RANK"]
    phases = Phases([fault for fault in asked["faults"] if fault["rank"] in (int(rank), None)])
    record = f"{asked['record']}/{rank}.calls"
    phases.library.faults_record(record.encode(), asked["trace"])
    phases.library.faults_store(int(os.environ["MASTER_PORT"]))
    phases.entered_by(start, "_claim", "start", returns=False)
    phases.entered_by(loop, "resume", "resume")
    phases.entered_by(Feed, "read", "step", returns=False)
    phases.entered_by(MidRunEvaluation, "look", "evaluation")
    phases.entered_by(Checkpoints, "save", "save")
    return main(arguments)


if __name__ == "__main__":
    _slow_saves.run = run  # what the server calls in each rank
    sys.exit(_slow_saves.serve())
