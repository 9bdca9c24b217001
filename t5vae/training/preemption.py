"""Being told to stop: a signal sets a flag, the loop looks at it between steps."""

import os
import shutil
import signal
import subprocess
import sys
from types import FrameType

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: slurm/train.sh and the launcher's script then requeue


class StopRequest:
    """What the signals asked for.

    SIGUSR2 (the warning before a time limit) asks to save, requeue and exit; SIGTERM and SIGINT to
    save and exit. A second SIGINT exits at once.

    Attributes:
        requested: stop at the next step boundary.
        requeue: and come back.
    """

    def __init__(self) -> None:
        self.requested = False
        self.requeue = False
        self.interrupted = False

    def install(self) -> None:
        """Take over the signals; before heavy imports, and in place of a launcher's handlers."""
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.interrupted:
            sys.exit(130)
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.requested = True
        self.requeue = self.requeue or number == signal.SIGUSR2


def job_id() -> str | None:
    """The SLURM job that this process belongs to; ARRAY_TASK in an array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue_job() -> bool:
    """Ask SLURM to run this job again.

    Returns:
        False outside a job, where SLURM's commands are missing, as in a container, or where SLURM
        refuses, which is told.
    """
    job = job_id()
    if job is None or shutil.which("scontrol") is None:
        return False
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if answer.returncode:
        reason = " ".join(answer.stderr.split())
        print(f"job {job} is not queued again: {reason}", file=sys.stderr)
    return answer.returncode == 0


def queue_again() -> None:
    """Ask SLURM to run this job again, or end this process with the code that asks its script to.

    Raises:
        SystemExit: with `AGAIN`, in a job whose container lacks SLURM's commands.
    """
    if job_id() and not requeue_job():
        sys.exit(AGAIN)
