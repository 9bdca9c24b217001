"""What the launcher asks of a backend, whatever runs the jobs; `launcher.backends` names each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from t5vae.config import Config


@dataclass(frozen=True)
class State:
    """What a backend says of a job.

    Attributes:
        word: its own, such as RUNNING.
        nodes: hosts the job is on, or how many it waits for.
        time_left: as the backend writes it.
        reason: why it waits; empty where it does not.
        is_live: whether it runs or will.
    """

    word: str
    nodes: str = "-"
    time_left: str = "-"
    reason: str = ""
    is_live: bool = True


ENDED = State("ENDED", is_live=False)  # of a job that its backend has forgotten


def ranks_per_node(config: Config) -> int:
    """One rank a GPU; without GPUs, one a node."""
    return max(1, config.launcher.gpus_per_node)


class Task(Protocol):
    """What each rank of a job calls, pickled: `launcher.task.Training`."""

    config: Config

    def __call__(self) -> None: ...


class Backend(Protocol):
    """A module with these functions. A job's id is a file's name; an array's task is ARRAY_TASK."""

    def require(self) -> None:
        """Make sure that this machine can queue jobs; a `UserError` says why not."""

    def queue(self, tasks: Sequence[Task], folder: Path, after: list[str]) -> list[str]:
        """Queue a job for each task, as the `launcher` section of its configuration says.

        Args:
            tasks: of runs that differ in nothing that the section says.
            folder: of the backend's own files and the logs.
            after: jobs that must end first, where the backend can wait.

        Returns:
            The jobs' ids.

        Raises:
            UserError: the backend refuses them.
        """

    def script(self, configs: Sequence[Config], folder: Path) -> str:
        """What `queue` would hand in, for a dry run; on any machine."""

    def enter(self) -> None:
        """In a process of a job, before it trains: tell it its place among the ranks."""

    def states(self, ids: list[str]) -> dict[str, State]:
        """What became of jobs; those it has forgotten are left out.

        Raises:
            UserError: it does not answer.
        """

    def home(self, job: str) -> Path | None:
        """The folder that a live job was queued with; None where that is not known."""

    def cancel(self, ids: list[str]) -> None:
        """Stop live jobs for good, with a warning that lets training save.

        Raises:
            UserError: it refuses.
        """

    def log(self, folder: str, job: str, rank: int) -> Path:
        """Where a rank prints; `folder` is empty for a job that was not submitted here."""
