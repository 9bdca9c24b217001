"""Starts of a run by each of its launchers, and who can be killed of them.

What belongs to a start is found by an environment variable, `MARK`, so that a later process finds
what an earlier one left. `_slow_saves.py` stands in `train.py`'s place.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.cluster import cluster
from tests.launching import BIN, SLOW_SAVES, Launch, Ranks, environment
from tests.soak.reads import Reads

ROOT = Path(__file__).parents[2]
MARK = "T5VAE_SOAK"  # holds the folder of a start and a slash
PATIENCE = 300  # seconds until something is given up, far more than anything needs
LOST = 90  # seconds in which SLURM takes a host for lost that is
ORPHANED = 40  # seconds in which SLURM ends a job that lost a process of SLURM's own
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")
OF_SLURM = ("srun", "slurm_script", "slurmstepd")


def processes(folder: Path) -> list[psutil.Process]:
    """What was started with `MARK` in a folder, or under it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(f"{folder}/"):
                found.append(process)
    return found


def kill_all(folder: Path) -> None:
    """Kill what was started in a folder, and wait until it has ended."""
    deadline = time.monotonic() + PATIENCE
    while left := [each for each in processes(folder) if each.pid != os.getpid()]:
        assert time.monotonic() < deadline, left
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


class Attempt(Reads, ABC):
    """A start of the run.

    Args:
        world: ranks.
        folder: what its ranks read goes here, and what it prints.
        marked: the folder that its processes are found by.
    """

    def __init__(self, world: int, folder: Path, marked: Path):
        super().__init__(world, folder)
        self.marked = marked

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether what was started runs."""

    @abstractmethod
    def output(self) -> str:
        """What it printed."""

    @abstractmethod
    def code(self) -> Any:
        """How what was started has ended."""

    def kill(self) -> None:
        """Kill all that is left."""
        kill_all(self.marked)

    def ranks(self) -> dict[int, psutil.Process]:
        """Those that live."""
        found = {}
        for process in processes(self.marked):
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                rank = env.get("RANK") or env.get("SLURM_PROCID")
                if rank and str(SLOW_SAVES) in process.cmdline():
                    found[int(rank)] = process
        return found

    def launchers(self) -> list[psutil.Process]:
        """The launcher's own processes."""
        return []

    def wait(self, seen: Callable[[], object], pause: float = 0.005) -> None:
        """Until something is seen while it runs."""
        deadline, asked = time.monotonic() + PATIENCE, 0.0
        while not seen():
            now = time.monotonic()
            if now > asked + 0.5:
                assert self.is_alive(), f"ended too early:\n{self.output()[-3000:]}"
                asked = now
            assert now < deadline, self.output()[-3000:]
            time.sleep(pause)

    def wait_for_ranks(self) -> None:
        """Until all of them have ended."""
        self._until(lambda: not self.ranks())

    def end(self) -> Any:
        """Wait until nothing is left of it; how it has ended."""
        self._until(lambda: not (self.is_alive() or self.ranks()))
        return self.code()

    def _until(self, ended: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ended():
            assert time.monotonic() < deadline, f"does not end:\n{self.output()[-3000:]}"
            time.sleep(0.1)


class Forked(Attempt):
    """Ranks without a launcher, forked by a process that has all imports."""

    def __init__(self, started: Ranks, world: int, folder: Path):
        super().__init__(world, folder, folder)
        self.started = started

    def is_alive(self) -> bool:
        return bool(self.ranks())

    def output(self) -> str:
        return "".join(self.started.output(rank) for rank in range(self.world))

    def code(self) -> list[int]:
        return self.started.end()

    def kill(self) -> None:
        self.started.kill()

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for rank, files in enumerate(self.started.files):
            with contextlib.suppress(psutil.Error):
                if not files["exit"].exists():
                    found[rank] = psutil.Process(self.started.pid(rank))
        return found


class Local(Attempt):
    """`deepspeed` or `torchrun` on this machine."""

    OPTIONS = {  # noqa: RUF012
        "deepspeed": ("--log_level", "error", "--num_accelerators", "--master_port"),
        "torchrun": ("--nproc-per-node", "--master-port"),
    }

    def __init__(
        self, launcher: str, port: int, world: int, folder: Path, asked: dict, *arguments: Any
    ):
        super().__init__(world, folder, folder)
        *options, ranks, at = self.OPTIONS[launcher]
        command = [BIN / launcher, *options, ranks, world, at, port, SLOW_SAVES, *arguments]
        log = folder / "output"
        with open(log, "w") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment() | {MARK: f"{folder}/", "SLOW_SAVES": json.dumps(asked)},
                start_new_session=True,
            )
        self.program = Launch(process, log)

    def is_alive(self) -> bool:
        return self.program.is_alive()

    def output(self) -> str:
        return self.program.output()

    def code(self) -> int:
        return self.program.end()

    def launchers(self) -> list[psutil.Process]:
        found = []
        for process in processes(self.marked):
            with contextlib.suppress(psutil.Error):
                own = process.pid == self.program.process.pid
                if own or "deepspeed.launcher.launch" in process.cmdline():
                    found.append(process)
        return found


def bring_back(host: str) -> None:
    """Start a host again once SLURM takes it for lost; before, it would wait for tasks that the
    host lost as they started.
    """
    end = time.monotonic() + LOST
    while not cluster.is_down(host) and time.monotonic() < end:
        time.sleep(0.5)
    cluster.start_node(host)


class Slurm:
    """sbatch and its like, from a user's shell; and the three hosts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked = folder / "slow_saves.json"  # read as ranks start, a job's later ones too
        self.job: str | None = None
        python = folder / "env/bin/python"
        python.parent.mkdir(parents=True, exist_ok=True)
        # In place of slurm/train.sh's `python -u -P -m t5vae train`.
        command = f'exec {BIN}/python -u {SLOW_SAVES} "$@"'
        python.write_text(f'#!/bin/sh\nshift 5\nSLOW_SAVES=$(cat "{self.asked}") {command}\n')
        python.chmod(0o755)
        self.was_up = cluster.is_up()
        cluster.packages()
        cluster.up()
        for name in cluster.node_names():
            if not cluster.pids(name):
                cluster.start_node(name)
        self("scancel", f"--name={folder.name}")
        cluster._wait("the nodes", lambda: cluster.idle() == len(cluster.node_names()))

    def __call__(self, *command: object, **more: str) -> str:
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "T5VAE_ENV": str(self.folder / "env"), **more}
        words = [str(part) for part in command]
        done = subprocess.run(words, env=env, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, world: int, folder: Path, asked: dict, *arguments: Any) -> "Job":
        """Submit the run; where its job is queued again already, that is the next attempt."""
        self.asked.write_text(json.dumps(asked))
        if self.job is None:
            output = f"--output={self.folder}/slurm-%j.out"
            place = (f"--nodes={world}", f"--chdir={ROOT}", output)
            named = ("--parsable", f"--job-name={self.folder.name}")
            script = (ROOT / "slurm/train.sh", *arguments)
            self.job = self("sbatch", *named, *place, *script, **{MARK: f"{folder}/"}).strip()
            self.marked = folder
        return Job(self, self.job, world, folder, self.marked)

    def about(self, job: str) -> dict[str, str]:
        """A job's state, how often it was queued again, and its hosts."""
        told = dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))
        names = {"state": "JobState", "restarts": "Restarts", "hosts": "NodeList"}
        return {name: told.get(key, "") for name, key in names.items()}


class Job(Attempt):
    """One attempt of a job of SLURM's: until it is over, or queued again."""

    def __init__(self, slurm: Slurm, job: str, world: int, folder: Path, marked: Path):
        super().__init__(world, folder, marked)
        self.slurm, self.job = slurm, job
        self.before = slurm.about(job)["restarts"]
        self.log = slurm.folder / f"slurm-{job}.out"
        self.told = len(self.log.read_bytes()) if self.log.exists() else 0

    def is_alive(self) -> bool:
        about = self.slurm.about(self.job)
        return about["state"] not in OVER and about["restarts"] == self.before

    def output(self) -> str:
        text = self.log.read_bytes() if self.log.exists() else b""
        return text[self.told :].decode(errors="replace")

    def code(self) -> str:
        state = self.slurm.about(self.job)["state"]
        if state not in OVER:
            return "queued again"
        self.slurm.job = None
        return state

    def kill(self) -> None:
        self.slurm("scancel", self.job)
        deadline = time.monotonic() + PATIENCE
        while self.is_alive():
            kill_all(self.marked)
            assert time.monotonic() < deadline, "the job does not end"
        self.slurm.job = None

    def hosts(self) -> list[str]:
        """Those with a rank of it."""
        ours = {process.pid for process in processes(self.marked)}
        return [name for name in cluster.node_names() if ours.intersection(cluster.pids(name))]

    def launchers(self) -> list[psutil.Process]:
        found = []
        for host in self.hosts():
            for pid in cluster.pids(host):
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if process.name() in OF_SLURM:
                        found.append(process)
        return found


def die(process: psutil.Process) -> None:
    """Kill a process, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def name_of(launcher: psutil.Process) -> str:
    """Of a launcher's process, for people."""
    line = " ".join(launcher.cmdline())
    if "deepspeed.launcher.launch" in line:
        return "deepspeed.launcher.launch"
    part = "the script" if ".batch]" in line else "the step"
    return f"slurmstepd of {part}" if launcher.name() == "slurmstepd" else launcher.name()
