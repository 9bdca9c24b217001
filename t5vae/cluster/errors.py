"""What can go wrong between the ranks of a run, and what errors mean for all of them."""

import errno
import os
from dataclasses import dataclass

from t5vae.cluster.scheduler import RANK
from t5vae.common.errors import DISK_FULL, StorageError, UserError, first_line
from t5vae.common.storage import WEATHER

MENDABLE = (
    *DISK_FULL,
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


class SharedError(UserError):
    """What a user can mend, and all ranks raise alike."""


class SharedStorageError(StorageError):
    """Storage that failed some ranks, raised by all."""


class UnhealthyError(UserError):
    """Some hosts of a job cannot train, while others can.

    Attributes:
        hosts: their names.
        is_first_healthy: whether this rank is the first of those on other hosts.
        weather: whether their storage failed, which may pass.
    """

    def __init__(self, text: str, hosts: list[str], *, is_first_healthy: bool, weather: bool):
        super().__init__(text)
        self.hosts = hosts
        self.is_first_healthy = is_first_healthy
        self.weather = weather


class FailedTogetherError(Exception):
    """What went wrong on some rank, told already; all ranks end with the same exit code."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


def asks_again(error: BaseException) -> bool:
    """Whether it is for this process to have the scheduler run the job again."""
    if isinstance(error, UnhealthyError):
        return error.is_first_healthy
    return os.environ.get("RANK", os.environ.get(RANK, "0")) == "0"


@dataclass(frozen=True)
class Verdict:
    """What an exception means for a run.

    Attributes:
        code: to exit with.
        text: one line for people.
        requeue: whether the run is worth another start as it is.
        fault: whether it is one of the program, whose traceback is wanted.
    """

    code: int
    text: str
    requeue: bool = False
    fault: bool = False


def judge(error: BaseException) -> Verdict:
    """What an exception that leaves training, or a command, means."""
    if isinstance(error, UnhealthyError) and error.weather:
        return Verdict(1, str(error), requeue=True)
    if isinstance(error, UserError):
        return Verdict(2, str(error))
    if isinstance(error, StorageError):
        return Verdict(1, str(error), requeue=error.requeue)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        return Verdict(2, str(error))
    if isinstance(error, OSError) and error.errno in WEATHER:
        return Verdict(1, f"the storage fails: {error}", requeue=True)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        code = error.code if isinstance(error, SystemExit) else 130
        return Verdict(code if isinstance(code, int) else 1, "interrupted")
    return Verdict(1, f"{type(error).__name__}: {first_line(error)}", fault=True)
