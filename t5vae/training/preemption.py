"""Being told to stop: a signal sets a flag, the loop looks at it between steps."""

import os
import shutil
import signal
import subprocess
import sys
from types import FrameType


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


def requeue_job() -> bool:
    """Ask SLURM to run this job again; False outside a SLURM job.

    Raises:
        subprocess.CalledProcessError: if SLURM refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    subprocess.run(["scontrol", "requeue", job], check=True)
    return True
