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
from t5vae.checkpoint.fragments import fragments, scalars, write
from t5vae.checkpoint.manifest import MANIFEST, seal
from t5vae.checkpoint.randomness import random_state
from t5vae.common.files import fsync


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
        self.pending: Future[dict[str, Any]] | None = None

    def start(self, engine: Any, step: int, manifest: dict[str, Any]) -> None:
        """Begin to save; `finish` must follow before the next step unless `asynchronous`.

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
        self.tmp = self.folder / f"step-{step:08d}.tmp"
        self.problem = None
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(self.tmp, ignore_errors=True)
                self.tmp.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.problem = _told(error)
        tensors = fragments(engine)
        generators, plain = random_state()
        tensors |= {f"random/{name}/0": state for name, state in generators.items()}
        if self.asynchronous:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        dist.barrier()
        path = self.tmp / f"rank-{dist.get_rank():05d}.safetensors"
        self.pending = self.thread.submit(_write, path, tensors, plain)
        self.stall = time.perf_counter() - self.started

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write of the checkpoint that was started."""
        return self.pending is not None and self.pending.done()

    def finish(self) -> Saved:
        """Wait for all ranks' files and commit the checkpoint.

        Raises:
            OSError: if a rank could not write; the checkpoints that exist stay valid.
        """
        assert self.pending is not None
        resumed = time.perf_counter()
        files: dict[str, Any] = {}
        problem = self.problem
        try:
            files = self.pending.result()
        except OSError as error:
            problem = problem or _told(error)
        self.pending = None
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (files, problem))
        problem = next((found for _, found in reports if found), None)
        target = self.tmp.with_suffix("")
        self.manifest["files"] = {name: of for files, _ in reports for name, of in files.items()}
        if dist.get_rank() == 0 and problem is None:
            try:
                _commit(self.tmp, target, self.manifest)
            except OSError as error:
                problem = _told(error)
        outcome = [problem]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            if dist.get_rank() == 0:
                shutil.rmtree(self.tmp, ignore_errors=True)
            raise OSError(outcome[0])
        now = time.perf_counter()
        size = sum(file["bytes"] for file in self.manifest["files"].values())
        return Saved(target, size, now - self.started, self.stall + now - resumed)

    def close(self) -> None:
        self.thread.shutdown()


def _told(error: OSError) -> str:
    return f"rank {dist.get_rank()}: {error.strerror or error}"


def _write(path: Path, tensors: dict[str, Tensor], plain: str) -> dict[str, Any]:
    return {path.name: write(path, tensors, {"random": plain})}


def _commit(tmp: Path, target: Path, manifest: dict[str, Any]) -> None:
    _write_manifest(tmp / MANIFEST, seal(manifest))
    fsync(tmp)
    if target.exists():
        retention.set_aside(target)
    tmp.rename(target)
    fsync(target.parent)


def _write_manifest(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
