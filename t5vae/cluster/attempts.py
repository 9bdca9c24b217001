"""Attempts: each start of training in a run's folder, and the end of a job that gets nowhere."""

from datetime import datetime
from pathlib import Path

from t5vae.cluster.scheduler import job_id
from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.files import read_records, write_records
from t5vae.common.records import Name, Record, Time
from t5vae.common.storage import patiently

ATTEMPTS = "attempts.jsonl"


class Attempt(Record):
    """A start of training.

    Attributes:
        job: that it was in; None for none.
        step: of the newest checkpoint, from which it began.
        folder: the run's, where it was then; None if an older version wrote it.
    """

    job: Name | None
    step: int
    folder: str | None = None
    time: Time = "1970-01-01T00:00:00+00:00"


def read(folder: Path) -> list[Attempt]:
    """The attempts of a run, the newest last.

    Raises:
        UserError: they are damaged, or cannot be read.
        StorageError: the storage failed for minutes.
    """
    return records.read(Attempt, folder / ATTEMPTS)


def begin(folder: Path, step: int, hosts: tuple[str, ...], *, max_restarts: int) -> int:
    """Write down that training starts; rank 0 alone, with the folder locked.

    Args:
        folder: the run's.
        step: of its newest checkpoint; 0 without one.
        hosts: where the ranks are; empty where that is unknown.
        max_restarts: starts of one job from one step, after its first, before it gives up.

    Returns:
        The attempt's number, from 1.

    Raises:
        UserError: if this job was started that often already since its newest checkpoint; or if
            the attempts cannot be read or written.
        StorageError: if the storage failed for minutes.
    """
    path = folder / ATTEMPTS
    before = read_records(path)
    known = [records.check(Attempt, each, str(path)) for each in before]
    job = job_id()
    in_vain = 0
    for each in reversed(known):
        if job is None or (each.job, each.step) != (job, step):
            break
        in_vain += 1
    if in_vain > max_restarts:
        raise UserError(
            f"job {job} was started {in_vain} times from step {step:,} and saved nothing since: it "
            "gives up; see why in its log, then submit the run again"
        )
    attempt = {
        "attempt": len(before) + 1,
        "job": job,
        "step": step,
        "folder": str(folder.absolute()),
        "hosts": sorted(set(hosts)),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    try:
        patiently(lambda: write_records(path, [*before, attempt]), str(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return len(before) + 1
