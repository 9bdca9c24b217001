"""Jobs of runs: which there are, what became of them, and their end.

A job that was submitted has a record in its run's folder, jobs/ID.json; beside it, or for a sweep
in the folder above, lie submitit's files and one log a rank, jobs/ID_RANK_log.out. A job of plain
sbatch is known from the attempts that its training wrote down.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from t5vae.common.errors import UserError
from t5vae.common.files import read_records, write_records

Cluster = Literal["slurm", "local"]

OVER = (
    *("ENDED", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
)


@dataclass(frozen=True)
class Job:
    """A job of a run.

    Attributes:
        id: SLURM's, ARRAY_TASK for one of a sweep; of a local job, the process that minds ranks.
        logs: folder of its logs; empty for a job of plain sbatch.
        time: when it was submitted, or first trained if by plain sbatch; of ISO 8601 with a zone.
    """

    id: str
    run: Path
    cluster: Cluster
    logs: str
    time: str

    @property
    def order(self) -> tuple[datetime, list[int]]:
        """Sorts jobs by age, and those of one array by number; the newest last."""
        return datetime.fromisoformat(self.time), [int(part) for part in self.id.split("_")]

    def log(self, rank: int = 0) -> Path:
        """What a rank printed, over all restarts of the job."""
        if not self.logs:
            return Path(f"slurm-{self.id}.out")
        return Path(self.logs) / f"{self.id}_{rank}_log.out"

    def record(self) -> None:
        """Write the job down in its run's folder."""
        folder = self.run / "jobs"
        folder.mkdir(exist_ok=True)
        record = {key: value for key, value in asdict(self).items() if key != "run"}
        write_records(folder / f"{self.id}.json", [record])


@dataclass(frozen=True)
class State:
    """What SLURM, or this machine, says of a job.

    Attributes:
        word: SLURM's word such as RUNNING; ENDED where the job is forgotten.
        nodes: hosts it is on, or how many it waits for.
        time_left: as SLURM writes it.
        reason: why it waits.
    """

    word: str
    nodes: str = "-"
    time_left: str = "-"
    reason: str = ""

    @property
    def is_live(self) -> bool:
        return self.word not in OVER


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def find(run_or_job: str | None = None) -> list[Job]:
    """The jobs of a run's or a sweep's folder, those of an id, or all jobs of the runs in runs/.

    Returns:
        Jobs, the newest last.

    Raises:
        UserError: there is none.
    """
    folder = Path(run_or_job or "runs")
    if run_or_job is None:
        jobs, where = _jobs_below(folder), "in runs/"
    elif folder.is_dir():
        jobs, where = [*_jobs_of(folder), *_jobs_below(folder)], f"in {run_or_job}"
    else:
        jobs = [job for job in _jobs_below(Path("runs")) if run_or_job in (job.id, _array(job.id))]
        where = f"{run_or_job} in runs/, nor such a run folder"
    if not jobs:
        raise UserError(f"no job {where}")
    return sorted(jobs, key=lambda job: job.order)


def newest_of_each_run(jobs: list[Job]) -> list[Job]:
    return list({job.run: job for job in jobs}.values())


def _array(job: str) -> str:
    return job.partition("_")[0]


def _jobs_below(folder: Path) -> list[Job]:
    """Of the runs in a folder, and of the runs of sweeps in it."""
    return [
        job
        for depth in ("*", "*/*")
        for run in sorted(folder.glob(depth))
        if run.is_dir()
        for job in _jobs_of(run)
    ]


def _jobs_of(run: Path) -> list[Job]:
    files = (run / "jobs").glob("*.json")
    records = [record for file in files for record in read_records(file)]
    jobs = {record["id"]: Job(run=run, **record) for record in records}
    for attempt in read_records(run / "attempts.jsonl"):
        if attempt["job"] and attempt["job"] not in jobs:
            jobs[attempt["job"]] = Job(attempt["job"], run, "slurm", "", attempt["time"])
    return sorted(jobs.values(), key=lambda job: job.order)


def states(jobs: Iterable[Job]) -> dict[str, State]:
    """What became of jobs, by their ids; SLURM is asked once.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs = list(jobs)
    ids = [job.id for job in jobs if job.cluster == "slurm"]
    found = _ask_slurm(ids) if ids and shutil.which("squeue") else {}
    found |= {job.id: _local_state(job.id) for job in jobs if job.cluster == "local"}
    return {job.id: found.get(job.id, State("ENDED")) for job in jobs}


def _ask_slurm(ids: list[str]) -> dict[str, State]:
    columns = "--format=%i|%T|%N|%D|%L|%r"
    answer = _run(
        "squeue", "--noheader", "--array", "--states=all", columns, f"--jobs={_list(ids)}"
    )
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue does not answer: {' '.join(answer.stderr.split())}")
    found = {}
    for line in answer.stdout.splitlines():
        job, word, hosts, count, left, reason = line.split("|")
        waits = word == "PENDING"  # where a job was before it was requeued says nothing
        found[job] = State(word, count if waits or not hosts else hosts, left, reason)
    forgotten = [job for job in ids if job not in found]
    if forgotten and shutil.which("sacct"):  # fails where the cluster keeps no accounts
        options = (
            *("--noheader", "--parsable2", "--allocations"),
            "--format=JobID,State,NodeList",
        )
        for line in _run("sacct", *options, f"--jobs={_list(forgotten)}").stdout.splitlines():
            job, word, hosts = line.split("|")
            found[job] = State(word.split()[0], hosts)
    return found


def _list(ids: list[str]) -> str:
    return ",".join(ids)


def _local_state(pid: str) -> State:
    with contextlib.suppress(psutil.Error):
        if "submitit.local" in " ".join(psutil.Process(int(pid)).cmdline()):
            return State("RUNNING", "localhost")
    return State("ENDED")


def holder(run: Path) -> Job | None:
    """The live job that holds a run's folder: it trains there, or waits to.

    Raises:
        UserError: a process that is no job of this folder trains there, or SLURM does not answer.
    """
    jobs = _jobs_of(run)
    lock = run / ".lock"
    trains = read_records(lock)
    if trains and trains[0]["job"] not in (None, *(job.id for job in jobs)):
        jobs.append(Job(trains[0]["job"], run, "slurm", "", now()))
    known = states(jobs)
    live = [job for job in jobs if known[job.id].is_live]
    if not live and lock.exists() and _is_locked(lock):
        raise UserError(f"another process is training in {run}; wait for it, or set run.output_dir")
    return live[-1] if live else None


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def cancel(jobs: list[Job]) -> list[Job]:
    """Stop jobs for good; training saves first if time allows.

    Returns:
        Those that were still live.

    Raises:
        UserError: all have ended, or SLURM refuses.
    """
    known = states(jobs)
    live = [job for job in jobs if known[job.id].is_live]
    if not live:
        raise UserError(f"job {_list([job.id for job in jobs])} has ended already")
    for job in live:
        if job.cluster == "local":
            os.kill(int(job.id), signal.SIGTERM)
    ids = [job.id for job in live if job.cluster == "slurm"]
    if ids:
        answer = _run("scancel", *ids)
        if answer.returncode:
            raise UserError(" ".join(answer.stderr.split()))
    return live


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)
