"""Jobs on this machine: submitit's, all ranks of all nodes as processes in the background.

A job's id is the process that minds its ranks, which stays when its caller ends.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from submitit.helpers import TorchDistributedEnvironment
from submitit.local.local import LocalExecutor

from launcher import slurm
from launcher.backend import State, Task, ranks_per_node
from t5vae.common.environment import changed
from t5vae.config import Config


def require() -> None:
    """Any machine will do."""


def queue(tasks: Sequence[Task], folder: Path, after: list[str]) -> list[str]:
    """Start the processes of each task, all at once and whatever else runs."""
    config = tasks[0].config
    place = config.launcher
    slurm.require_plain(folder)
    executor = LocalExecutor(folder)
    executor.update_parameters(
        timeout_min=place.time,
        tasks_per_node=place.nodes * ranks_per_node(config),
        gpus_per_node=place.nodes * place.gpus_per_node,
        stderr_to_stdout=True,
    )
    with _own_output(), changed({slurm.SAFE: "1"}):
        return [job.job_id for job in executor.submit_array(tasks)]


def script(configs: Sequence[Config], folder: Path) -> str:
    """SLURM's: a process of this machine has no script, and the configuration may go there next."""
    return slurm.script(configs, folder)


def enter() -> None:
    """Tell this process its place among the ranks by the environment, as torchrun would."""
    ranks = TorchDistributedEnvironment()
    ranks.master_addr = "127.0.0.1"
    ranks.export(set_cuda_visible_devices=False, overwrite=True)


def states(ids: list[str]) -> dict[str, State]:
    """RUNNING, for the jobs that still do."""
    return {job: State("RUNNING", "localhost") for job in ids if _is_running(job)}


def _is_running(pid: str) -> bool:
    return "submitit.local._local" in _words(pid)


def home(job: str) -> Path | None:
    """The last word of the process, which is its own: anybody may write down another's number."""
    words = _words(job)
    return Path(words[-1]) if words else None


def _words(pid: str) -> list[str]:
    """What a process was started with; nothing where it is gone, or another user's."""
    if not pid.isdecimal():
        return []
    with contextlib.suppress(psutil.Error, OverflowError):
        return psutil.Process(int(pid)).cmdline()
    return []


def cancel(ids: list[str]) -> None:
    """Tell the processes to end; training saves first."""
    for job in ids:
        os.kill(int(job), signal.SIGTERM)


def log(folder: str, job: str, rank: int) -> Path:
    """submitit's file."""
    return Path(folder) / f"{job}_{rank}_log.out"


@contextlib.contextmanager
def _own_output() -> Iterator[None]:
    """Processes started inside write to nowhere, and keep no pipe of the caller's open."""
    streams = (1, 2)
    kept = [os.dup(stream) for stream in streams]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in streams:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in zip(streams, kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
