"""Saving a checkpoint, all ranks together: it is either whole or not there.

Every rank writes its own file into `step-00001000.tmp/` and hashes it; when all have, rank 0 writes
the manifest and renames the folder.
"""

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from t5vae.checkpoint import retention
from t5vae.checkpoint.files import exists, move
from t5vae.checkpoint.fragments import fragments, ranges, scalars
from t5vae.checkpoint.manifest import MANIFEST, fingerprint, seal
from t5vae.checkpoint.randomness import random_state
from t5vae.checkpoint.rank_files import file_name, write
from t5vae.checkpoint.staging import Staging
from t5vae.cluster.agreement import from_first, gather_objects
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import StorageError, UserError, first_line
from t5vae.common.files import fsync
from t5vae.common.storage import patiently

FAILURES = (OSError, StorageError, UserError)
"""Why a checkpoint cannot be saved; what else goes wrong is a fault of the program."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed.

    Attributes:
        bytes: of all ranks' files.
        seconds: from the start of the save until it was committed.
        stall: seconds that training waited for it.
    """

    path: Path
    bytes: int
    seconds: float
    stall: float


class Saver:
    """Writes a run's checkpoints.

    Args:
        folder: `checkpoints/` of the run, shared by all ranks.
        asynchronous: `start` copies the state, and a thread writes it while training goes on.
    """

    def __init__(self, folder: Path, *, asynchronous: bool):
        self.folder = folder
        self.asynchronous = asynchronous
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.staging = Staging()
        self.pending: Future[dict[str, Any]] | None = None

    def start(self, engine: Any, step: int, manifest: dict[str, Any]) -> None:
        """Begin to save; `finish` must follow, before the next step unless `asynchronous`.

        Args:
            step: steps done.
            manifest: what the manifest holds beside step, world size, scalars and files.
        """
        self.started = time.perf_counter()
        self.manifest = {
            "step": step,
            "world_size": dist.get_world_size(),
            "scalars": scalars(engine),
            **manifest,
        }
        self.target = self.folder / f"step-{step:08d}"
        self.tmp = self.target.with_suffix(retention.UNFINISHED)
        problem: Exception | None = None
        if dist.get_rank() == 0:
            try:
                _make_empty(self.tmp)
            except FAILURES as error:
                problem = _told(error)
        self.problem = from_first(lambda: problem)
        tensors = fragments(engine)
        generators, plain = random_state()
        tensors |= {f"random/{name}/0": state for name, state in generators.items()}
        if self.asynchronous:
            tensors = self.staging.copy(tensors)
        self.ranges = ranges(engine)
        path = self.tmp / file_name(dist.get_rank())
        self.pending = self.thread.submit(_write, path, tensors, plain)
        self.stall = time.perf_counter() - self.started

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write of the checkpoint that was started."""
        return self.pending is not None and self.pending.done()

    def finish(self) -> Saved:
        """Wait for all ranks' files and commit the checkpoint.

        Raises:
            OSError, UserError: on all ranks, if one could not write; the checkpoints that exist
                stay valid.
            StorageError: likewise, if its storage failed for minutes.
        """
        assert self.pending is not None
        resumed = time.perf_counter()
        files: dict[str, Any] = {}
        problem = self.problem
        try:
            files = self.pending.result()
        except FAILURES as error:
            problem = problem or _told(error)
        self.pending = None
        reports = gather_objects((files, problem, fingerprint(self.ranges)))
        problem = next((found for _, found, _ in reports if found), None)
        self.manifest["files"] = {name: of for files, *_ in reports for name, of in files.items()}
        if len({ranges for *_, ranges in reports}) == 1:  # else files' headers tell
            self.manifest["ranges"] = self.ranges
        if dist.get_rank() == 0 and problem is None:
            try:
                _commit(self.tmp, self.target, self.manifest)
            except FAILURES as error:
                problem = _told(error)
        problem = from_first(lambda: problem)
        if problem:
            if dist.get_rank() == 0:
                shutil.rmtree(self.tmp, ignore_errors=True)
            raise problem
        now = time.perf_counter()
        size = sum(file["bytes"] for file in self.manifest["files"].values())
        return Saved(self.target, size, now - self.started, self.stall + now - resumed)

    def close(self) -> None:
        self.thread.shutdown()


def _told(error: Exception) -> Exception:
    """The same of this rank, for all of them."""
    text = f"rank {dist.get_rank()} on {host_name()}: {first_line(error)}"
    return OSError(error.errno, text) if isinstance(error, OSError) else type(error)(text)


def _make_empty(folder: Path) -> None:
    """Make a folder; what a crash left there is no part of the next checkpoint."""
    if exists(folder):
        doomed = retention.doomed(folder)
        move(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    patiently(lambda: folder.mkdir(parents=True, exist_ok=True), str(folder))


def _write(path: Path, tensors: dict[str, Tensor], plain: str) -> dict[str, Any]:
    """Write a rank's file; all of it again where the storage fails: a sync may have lost any."""
    return {path.name: patiently(lambda: write(path, tensors, {"random": plain}), str(path))}


def _commit(tmp: Path, target: Path, manifest: dict[str, Any]) -> None:
    content = seal(manifest)
    patiently(lambda: _write_manifest(tmp / MANIFEST, content), str(tmp / MANIFEST))
    patiently(lambda: fsync(tmp), str(tmp))
    if exists(target):
        retention.set_aside(target)
    move(tmp, target)
    patiently(lambda: fsync(target.parent), str(target.parent))


def _write_manifest(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
