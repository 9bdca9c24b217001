"""Jobs of runs: which there are, what became of them, and their end.

A job that was submitted has a record in its run's folder, jobs/ID.json; beside it, or for a sweep
in the folder above, lie its backend's files and one log a rank. A job of plain sbatch is known from
the attempts that its training wrote down.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from launcher.backend import ENDED, Backend, State, Task
from launcher.backends import BACKENDS
from t5vae.cluster import attempts
from t5vae.cluster.run_folder import LOCK, Holder, is_copied, is_same
from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.files import write_records
from t5vae.common.locks import Lock, take_lock
from t5vae.common.records import Name, Record, Time
from t5vae.common.storage import patiently

PLAIN = "slurm"  # the backend of plain sbatch's jobs, whose ids training writes down


class Written(Record):
    """What is written down of a job that was submitted."""

    id: Name
    cluster: Name
    logs: str
    time: Time
    folder: str | None = None


@dataclass(frozen=True)
class Job:
    """A job of a run.

    Attributes:
        id: its backend's; ARRAY_TASK for one of an array.
        cluster: its backend's name in `BACKENDS`.
        logs: folder of its logs as it was submitted; empty for a job of plain sbatch.
        time: when it was submitted, or first trained if by plain sbatch; of ISO 8601 with a zone.
        copied: it is of the run that this folder is a copy of.
        here: it was written down in this very folder, which was not moved, or handed over, since.
    """

    id: str
    run: Path
    cluster: str
    logs: str
    time: str
    copied: bool = False
    here: bool = True

    @property
    def order(self) -> tuple[datetime, list[str | int]]:
        """Sorts jobs by age, and those of one array by number; the newest last."""
        parts = re.split(r"(\d+)", self.id)  # text and numbers in turn
        return datetime.fromisoformat(self.time), [int(p) if p.isdecimal() else p for p in parts]

    def log(self, rank: int = 0) -> Path:
        """What a rank printed, over all restarts of the job.

        The run may have been moved, or be looked at from another working folder. Its backend's
        files are in it, or for a sweep in the folder above. Plain sbatch writes into the folder in
        which it was typed, which is this one or one above the run.
        """
        log = BACKENDS[self.cluster].log
        if not self.logs:
            name = log("", self.id, rank)
            paths = (folder / name for folder in (Path(), *self.run.absolute().parents))
            return next((path for path in paths if path.exists()), name)
        beside = filter(self._wrote_to, self.folders)
        return log(str(next(beside, self.folders[0])), self.id, rank)

    @property
    def folders(self) -> tuple[Path, Path]:
        """Where the backend's files may be, whatever folder is written down."""
        return self.run / "jobs", self.run.parent / "jobs"

    def _wrote_to(self, folder: Path) -> bool:
        files = folder.glob(f"{_array(self.id)}_*")
        return any(file.suffix != ".json" for file in files)  # a record is in every run

    def record(self) -> None:
        """Write the job down in its run's folder."""
        folder = self.run / "jobs"
        folder.mkdir(exist_ok=True)
        record = asdict(self) | {"folder": str(self.run.absolute())}
        del record["run"], record["copied"], record["here"]
        write_records(folder / f"{self.id}.json", [record])


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
    jobs = {}
    for file in (run / "jobs").glob("*.json"):
        for said in records.read(Written, file):
            if said.cluster not in BACKENDS:
                raise UserError(
                    f"{file} has a job on {said.cluster!r}, which is none of "
                    f"{', '.join(BACKENDS)}: remove it"
                )
            where = is_copied(said.folder, run), is_same(said.folder, run)
            jobs[said.id] = Job(said.id, run, said.cluster, said.logs, said.time, *where)
    for attempt in attempts.read(run):
        if attempt.job and attempt.job not in jobs:
            where = is_copied(attempt.folder, run), is_same(attempt.folder, run)
            jobs[attempt.job] = Job(attempt.job, run, PLAIN, "", attempt.time, *where)
    return sorted(jobs.values(), key=lambda job: job.order)


def queue(tasks: Sequence[Task], cluster: str, folder: Path, after: list[str]) -> list[Job]:
    """Queue tasks as jobs, and write each down in its run's folder.

    Args:
        tasks: one a run.
        cluster: a name in `BACKENDS`.
        folder: of the backend's files and the logs.
        after: jobs that must end first.

    Raises:
        UserError: the backend refuses.
        OSError: a record cannot be written; the jobs are cancelled.
    """
    ids = BACKENDS[cluster].queue(tasks, folder, after)
    jobs = [
        Job(job, task.config.run_dir, cluster, str(folder), now())
        for job, task in zip(ids, tasks, strict=True)
    ]
    try:
        for job in jobs:
            job.record()
    except OSError:
        cancel(jobs)
        raise
    return jobs


def states(jobs: Iterable[Job]) -> dict[str, State]:
    """What became of jobs, by their ids; each backend is asked once.

    Raises:
        UserError: one is silent.
    """
    jobs = list(jobs)
    found: dict[str, State] = {}
    for backend, ids in _by_backend(jobs):
        found |= backend.states(ids)
    others = {job.id for job in jobs if job.id in found and not _is_of_run(job)}
    return {job.id: found[job.id] if job.id in found.keys() - others else ENDED for job in jobs}


def _is_of_run(job: Job) -> bool:
    """Whether a job that its backend has is the one that was written down, as far as it can tell;
    numbers are given again, and anybody may write one down."""
    home = BACKENDS[job.cluster].home(job.id)
    return home is None or home.resolve() in [folder.resolve() for folder in job.folders]


def _by_backend(jobs: list[Job]) -> Iterator[tuple[Backend, list[str]]]:
    """Each backend that jobs are on, and their ids."""
    for name, backend in BACKENDS.items():
        if ids := [job.id for job in jobs if job.cluster == name]:
            yield backend, ids


def holder(run: Path) -> Job | None:
    """The live job that holds a run's folder: it trains there, or waits to.

    Raises:
        UserError: a process that is no job of this folder trains there, or a backend is silent.
    """
    jobs = [job for job in _jobs_of(run) if not job.copied]
    lock = run / LOCK
    trains = next(iter(records.read(Holder, lock)), Holder())
    known_jobs = [job.id for job in jobs]
    if trains.job and trains.job not in known_jobs and not is_copied(trains.folder, run):
        jobs.append(Job(trains.job, run, PLAIN, "", now()))
    known = states(jobs)
    live = [job for job in jobs if known[job.id].is_live]
    if not live and _is_locked(lock):
        raise UserError(f"another process is training in {run}; wait for it, or set run.output_dir")
    return live[-1] if live else None


def _is_locked(path: Path) -> bool:
    def look() -> bool:
        with open(path) as file:
            return take_lock(file, shared=True) is Lock.ANOTHERS

    try:
        return patiently(look, str(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def cancel(jobs: list[Job]) -> list[Job]:
    """Stop jobs for good; training saves first if time allows.

    Returns:
        Those that were still live.

    Raises:
        UserError: all have ended, or are those of a run that this is a copy of, or perhaps
            somebody else's; or a backend refuses.
    """
    if copied := [job for job in jobs if job.copied]:
        raise UserError(f"{copied[0].run} is a copy, and job {copied[0].id} its original's")
    known = states(jobs)
    live = [job for job in jobs if known[job.id].is_live]
    if not live:
        raise UserError(f"job {','.join(job.id for job in jobs)} has ended already")
    for job in live:
        if not job.here and BACKENDS[job.cluster].home(job.id) is None:
            raise UserError(
                f"{job.run} was moved, or handed over, since it named job {job.id}, which may be "
                "any job of yours: end it by its number"
            )
    for backend, ids in _by_backend(live):
        backend.cancel(ids)
    return live
