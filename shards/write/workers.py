"""Jobs: work that is cut into numbered tasks, done in processes, and finished once for all."""

import json
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from t5vae.common.files import written
from t5vae.common.progress import Advance, Unit, stage
from t5vae.common.storage import patiently

Counts = dict[str, Any]
TICK = 0.2  # seconds between looks at the workers' progress


@dataclass(frozen=True)
class Job(ABC):
    """One stage of a build; a worker gets it whole, by pickle."""

    title: ClassVar[str]
    unit: ClassVar[Unit] = "items"

    folder: Path
    """Where the results go. `NNNNN.json`, which holds its counts, marks task N as finished."""

    @property
    @abstractmethod
    def tasks(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def total(self) -> int:
        """How many units all tasks advance by; 0 if that is not known."""

    @abstractmethod
    def __call__(self, task: int, advance: Advance) -> Counts:
        """Do one task, with the same result whenever and wherever it is done."""


def carry_out(job: Job, workers: int) -> list[Counts]:
    """Do the tasks of a job that are not finished yet.

    Args:
        job: the job.
        workers: how many processes; 1 works in this one.

    Returns:
        The counts of each task.

    Raises:
        BrokenProcessPool: a worker died.
        Exception: what a task raised.
    """
    job.folder.mkdir(exist_ok=True)
    there = finished(job.folder)
    missing = [task for task in range(job.tasks) if task not in there]
    if missing:
        done = sum(counts["advanced"] for counts in there.values())
        with stage(job.title, job.total or None, done, job.unit) as advance:
            if workers > 1 and len(missing) > 1:
                _in_processes(job, missing, min(workers, len(missing)), advance)
            else:
                for task in missing:
                    _do(job, task, advance)
    return [counts for _, counts in sorted(finished(job.folder).items())]


def finished(folder: Path) -> dict[int, Counts]:
    """The counts of a job's finished tasks; none where there is no folder."""
    try:
        results = [path for path in folder.iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return {}
    return {int(path.stem): json.loads(path.read_text()) for path in results}


def _do(job: Job, task: int, advance: Advance) -> None:
    """Do a task, and again from its beginning where the storage of its results fails."""
    result = job.folder / f"{task:05}.json"

    def attempt() -> None:
        advanced = 0

        def count(units: int) -> None:
            nonlocal advanced
            advanced += units
            advance(units)

        try:
            counts = job(task, count)
            with written(result) as path:
                path.write_text(json.dumps(counts | {"advanced": advanced}))
        except OSError:
            advance(-advanced)
            raise

    patiently(attempt, str(result.with_suffix("")))


def _in_processes(job: Job, tasks: list[int], workers: int, advance: Advance) -> None:
    context = get_context("spawn")
    progress = context.Value("q")
    theirs, mine = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (job, progress, theirs))
    with pool, closing(mine):  # closed first: the workers end at once, busy or not
        # A queue: Ctrl-C inside futures.wait() may leave their locks taken, and the pool stuck.
        ended: SimpleQueue[Future] = SimpleQueue()
        with _interrupts_held():
            for task in tasks:
                pool.submit(_work, task).add_done_callback(ended.put)
        seen, missing = 0, len(tasks)
        while missing:
            with suppress(Empty):
                ended.get(timeout=TICK).result()
                missing -= 1
            now = progress.value
            advance(now - seen)
            seen = now


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes begun here never see Ctrl-C: what it ends is for their parent to say."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_worker: tuple[Job, Advance]


def _begin(job: Job, progress: "Synchronized[int]", alive: Connection) -> None:
    """Prepare a worker: one thread, and an end with its parent."""
    import pyarrow

    global _of_worker
    os.environ["RAYON_NUM_THREADS"] = "1"
    pyarrow.set_cpu_count(1)

    def advance(units: int) -> None:
        with progress.get_lock():
            progress.value += units

    _of_worker = job, advance
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    try:
        alive.recv()
    except EOFError:  # the parent closed its end, or died
        os._exit(1)


def _work(task: int) -> None:
    job, advance = _of_worker
    _do(job, task, advance)
