"""train.py, with pauses in saves and evaluations, a disk that fills up, a record of what it read.

The environment variable SLOW_SAVES holds a JSON object, all of whose keys may be left out:

    record: a folder; `sequences-RANK.jsonl` there gets the step and `batch.sequence` of each batch.
    pause: {point, save, rank, marker}: in the save of that number of this process (from 1), this
        rank makes the file `marker` at that point, one of POINTS, and sleeps while it is there.
        At one of EVALUATION, `save` counts evaluations.
    brake: a file; while it is there, each step takes a second longer.
    stop_at: {step, rank, marker}: the same in a step, outside of any save.
    disk: {SAVE: "full" | "free"}: before that save, rank 0 fills the disk of the run's folder, or
        makes room on it again.

As `python _slow_saves.py serve` it imports everything once, and then forks ranks: each line of its
input is {environment, arguments, output, pid, exit}, the last three paths that the rank's output,
its process id and, when it has ended, its exit code go to.
"""

import gc
import io
import json
import os
import select
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

POINTS = (
    "before the write",
    "half-way through the write",
    "before the gather",
    "before the manifest",
    "before the rename",
    "after the rename",
    "while the old one is deleted",
)
RANK_0_ALONE = POINTS[3:]
EVALUATION = ("before an evaluation", "while an evaluation decodes", "after an evaluation")


def run(arguments: list[str]) -> int:
    """train.py's `main`, with what SLOW_SAVES asks for."""
    from t5vae.training.main import main

    wanted = json.loads(os.environ.get("SLOW_SAVES", "{}"))
    if wanted:
        saves = _count_saves(wanted.get("disk", {}))
        _pause_in_saves(wanted.get("pause"), saves)
        _pause_in_evaluations(wanted.get("pause"))
        _watch_steps(wanted.get("record"), wanted.get("stop_at"), wanted.get("brake"))
    return main(arguments)


def _count_saves(disk: dict[str, str]) -> SimpleNamespace:
    from t5vae.checkpoint.saving import Saver

    saves = SimpleNamespace(started=0)
    start = Saver.start

    def counted(self: Saver, *args: Any) -> None:
        saves.started += 1
        ballast = self.folder.parents[1] / "ballast"
        what = disk.get(str(saves.started)) if _rank() == 0 else None
        if what == "full":
            _fill(ballast)
        elif what == "free":
            ballast.unlink()
        start(self, *args)

    Saver.start = counted
    return saves


def _fill(ballast: Path) -> None:
    with open(ballast, "ab", buffering=0) as file:
        while (left := shutil.disk_usage(ballast).free - 2**16) > 0:
            file.write(bytes(left))


def _pause_in_saves(pause: dict[str, Any] | None, saves: SimpleNamespace) -> None:
    from t5vae.checkpoint import rank_files, retention, saving

    def here(point: str) -> None:
        if pause and (point, saves.started) == (pause["point"], pause["save"]):
            _sleep(pause)

    def around(function: Callable, before: str | None, after: str | None = None) -> Callable:
        def paused(*args: Any) -> Any:
            if before:
                here(before)
            result = function(*args)
            if after:
                here(after)
            return result

        return paused

    class HalfWritten(io.BufferedWriter):
        writes = 0

        def write(self, content: Any) -> int:
            self.writes += 1
            if self.writes == 20:
                self.flush()
                here("half-way through the write")
            return super().write(content)

    sync = saving.fsync

    def sync_folder(folder: Path) -> None:
        here("before the rename" if folder.suffix == ".tmp" else "after the rename")
        sync(folder)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.suffix == ".deleted":
            next(path.iterdir()).unlink()
            here("while the old one is deleted")
        shutil.rmtree(path, ignore_errors)

    saving.write = around(saving.write, "before the write", "before the gather")
    saving._commit = around(saving._commit, "before the manifest")
    saving.fsync = sync_folder
    rank_files.open = lambda path, mode: HalfWritten(io.FileIO(path, mode))
    retention.shutil = SimpleNamespace(rmtree=rmtree)


def _pause_in_evaluations(pause: dict[str, Any] | None) -> None:
    from t5vae.training.midrun import DealtSpace, MidRunEvaluation

    begun = 0
    look, decode = MidRunEvaluation.look, DealtSpace.decode_ids

    def here(point: str) -> None:
        if pause and (point, begun) == (pause["point"], pause["save"]):
            _sleep(pause)

    def looked(self: MidRunEvaluation) -> Any:
        nonlocal begun
        begun += 1
        here("before an evaluation")
        found = look(self)
        here("after an evaluation")
        return found

    def decoded(*args: Any, **more: Any) -> Any:
        here("while an evaluation decodes")
        return decode(*args, **more)

    MidRunEvaluation.look, DealtSpace.decode_ids = looked, decoded


def _watch_steps(record: str | None, stop_at: dict[str, Any] | None, brake: str | None) -> None:
    from t5vae.training.step import Loss

    loss_of = Loss.__call__

    def watched(self: Loss, engine: Any, batch: Any, micro: int) -> Any:
        step = self.position // self.split.sequences + 1
        if record:
            line = json.dumps({"step": step, "sequences": batch.sequence.tolist()})
            with open(f"{record}/sequences-{_rank()}.jsonl", "a") as file:
                file.write(line + "\n")
        if stop_at and step == stop_at["step"]:
            _sleep(stop_at)
        if brake and Path(brake).exists():
            time.sleep(1)
        return loss_of(self, engine, batch, micro)

    Loss.__call__ = watched


def _sleep(where: dict[str, Any]) -> None:
    if _rank() == where["rank"]:
        marker = Path(where["marker"])
        marker.touch()
        while marker.exists():
            time.sleep(0.01)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))


def serve() -> int:
    """Fork the ranks that are asked for; in each of them, return its exit code."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (once, for all ranks)

    import t5vae.training.loop  # noqa: F401

    gc.freeze()  # so that a rank's collections do not copy every page
    exits = {}
    asked = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            read = os.read(0, 1 << 16)
            if not read:
                return 0
            *lines, asked = (asked + read).split(b"\n")
            for line in lines:
                rank = json.loads(line)
                pid = os.fork()
                if not pid:
                    return _as_rank(rank)
                exits[pid] = Path(rank["exit"])
                _put(Path(rank["pid"]), pid)
        if exits and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _put(exits.pop(ended[0]), os.waitstatus_to_exitcode(ended[1]))


def _as_rank(rank: dict[str, Any]) -> int:
    os.setsid()
    output = os.open(rank["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), output, output]):
        os.dup2(descriptor, number)
    os.environ.update(rank["environment"])
    return run(rank["arguments"])


def _put(path: Path, number: int) -> None:
    path.with_suffix(".new").write_text(str(number))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["serve"] else run(sys.argv[1:]))
