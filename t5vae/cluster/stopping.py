"""Being told to stop: by a signal, or by the end of the `deepspeed` process that started the run.

The loop asks between steps.
"""

import contextlib
import itertools
import os
import select
import signal
import sys
from pathlib import Path
from types import FrameType

import psutil

RUNNER = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"}
LAUNCH = "deepspeed.launcher.launch"


class StopRequest:
    """What was asked for.

    SIGUSR2 (the warning before a time limit) asks to save, requeue and exit; SIGTERM and SIGINT to
    save and exit. A second SIGINT exits at once. DeepSpeed's runner passes no signal on: it ends,
    and its ranks would train on as orphans, so its end asks to save and exit too.

    Attributes:
        told: a signal came.
        requeue: and the run is to come back.
    """

    def __init__(self) -> None:
        self.told = False
        self.requeue = False
        self.interrupted = False
        self.runner: list[int] = []  # its pidfd, readable once it has ended

    def install(self) -> None:
        """Take over the signals and find the runner, while it is there; before heavy imports.

        A launcher's own handlers are replaced.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        self.arrived, written = os.pipe()
        for end in (self.arrived, written):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        runner = open_runner()
        self.runner = [] if runner is None else [runner]

    @property
    def requested(self) -> bool:
        """Whether to stop at the next step boundary; asking takes a microsecond, in any thread."""
        return self.told or bool(self.runner and select.select(self.runner, [], [], 0)[0])

    def lets_requeue(self) -> bool:
        """Whether a job that failed may be run again: not where its end was asked for.

        Any thread may ask, while the main one waits for others and no handler runs.
        """
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.arrived, 1024):
                self._note(number)
        return self.requeue or not self.requested

    @property
    def reason(self) -> str:
        """Why, for people; where another rank asked, this one knows no more than that."""
        if self.requested and not self.told:
            return "the deepspeed process that started this run has ended"
        return "told to stop"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.interrupted:
            sys.exit(130)
        self.interrupted = self.interrupted or number == signal.SIGINT
        self._note(number)

    def _note(self, number: int) -> None:
        if number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            self.told = True
            self.requeue = self.requeue or number == signal.SIGUSR2


def signals_come_too_late() -> None:
    """From now on a warning, or a launcher that saw another rank end, changes no exit code.

    Python's own end would put the handlers of the system back, by which a signal kills, while its
    libraries still take a second or two to close.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def open_runner() -> int | None:
    """The `deepspeed` process above this one, on the same host.

    It is the parent of the process that starts a host's ranks. Under pdsh, srun and torchrun there
    is none, and one that has ended already leaves no trace.

    Returns:
        Its pidfd, which can be read from once it has ended, and is never that of another process,
        as its number may become; None where there is none, or the system has no pidfd.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    with contextlib.suppress(psutil.Error, OSError):
        for launch, runner in itertools.pairwise(psutil.Process().parents()):
            program = {Path(part).name for part in runner.cmdline()[:3]}
            if LAUNCH in launch.cmdline() and RUNNER & program:
                pidfd = os.pidfd_open(runner.pid)
                # Were it not that parent any more, the number might already be another's.
                return pidfd if launch.ppid() == runner.pid else None
    return None
