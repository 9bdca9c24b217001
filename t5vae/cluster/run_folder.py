"""The run's folder, made and locked: one run in it at a time."""

import json
import os
import secrets
from pathlib import Path
from typing import IO

from t5vae.cluster.scheduler import host_name, is_running, job_id
from t5vae.common import records
from t5vae.common.errors import UserError
from t5vae.common.files import parse_json
from t5vae.common.locks import Lock, open_lock, take_lock
from t5vae.common.records import Name, Record
from t5vae.common.storage import patiently

LOCK = ".lock"
LONGEST = 1 << 16  # characters of a lock's file


class Holder(Record):
    """Who wrote a run's lock file.

    Attributes:
        job: None for none.
        folder: the run's, where it was then; None if an older version wrote it.
    """

    job: Name | None = None
    host: str = ""
    folder: str | None = None


def make_folder(folder: Path) -> None:
    """Make a folder of the run.

    Raises:
        UserError: if it cannot be made.
        StorageError: if the storage failed for minutes.
    """
    try:
        patiently(lambda: folder.mkdir(parents=True, exist_ok=True), str(folder))
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def lock_run(folder: Path, *, anew: bool = False) -> IO[str]:
    """Make a run's folder and lock it; rank 0 alone. The lock dies with this process.

    The lock's file then says who holds it, with a token like no other, by which other ranks know
    the folder. File systems without locks, as Lustre may be, go by that alone.

    Args:
        folder: the run's.
        anew: refuse one that holds checkpoints.

    Raises:
        UserError: if another process trains in it, or it is to be new and is not.
        StorageError: if the storage failed for minutes.
    """
    make_folder(folder / "checkpoints")
    try:
        lock, before = patiently(lambda: _take(folder), str(folder))
    except OSError as error:
        raise UserError(f"cannot use the run folder {folder}: {error.strerror}") from None
    if lock is None:
        who = f" (job {before.job} on {before.host})" if before.job else ""
        raise UserError(
            f"another process{who} is training in {folder}; wait for it, or set run.output_dir"
        )
    if anew and any((folder / "checkpoints").iterdir()):
        lock.close()
        raise UserError(
            f"{folder} holds checkpoints and checkpoint.resume is never; "
            "set it to auto, or choose another run.output_dir"
        )
    return lock


def _take(folder: Path) -> tuple[IO[str] | None, Holder]:
    """Lock a run's folder, and say so in the lock's file.

    Returns:
        The lock, None where another has it; and who had it before.
    """
    job = job_id()
    lock = open_lock(folder / LOCK)  # held until the run ends
    lock.seek(0)
    before = _holder(lock.read(LONGEST))
    before = Holder() if is_copied(before.folder, folder) else before
    other = before.job if before.job != job else None
    if take_lock(lock) is Lock.ANOTHERS or (other and is_running(other)):
        lock.close()
        return None, before
    holder = {
        "job": job,
        "host": host_name(),
        "token": secrets.token_hex(16),
        "folder": str(folder.absolute()),
    }
    lock.truncate(0)
    lock.write(json.dumps(holder) + "\n")
    lock.flush()
    os.fsync(lock.fileno())  # so that other hosts read it
    return lock, before


def is_copied(original: str | None, folder: Path) -> bool:
    """Whether what was written in a run's folder speaks of another, which still has its own.

    A folder that was moved is the run's own; so is one that an older version wrote in.

    Args:
        original: the folder, as it was written down then.
        folder: where that lies now.
    """
    return original is not None and os.path.isdir(original) and not is_same(original, folder)


def is_same(original: str | None, folder: Path) -> bool:
    """Whether what was written in a run's folder was written where that lies now."""
    return original is not None and os.path.isdir(original) and os.path.samefile(original, folder)


def _holder(text: str) -> Holder:
    """Who wrote a lock's file; nobody where nobody did, or an older version."""
    try:
        return records.check(Holder, parse_json(text), LOCK)
    except (ValueError, UserError):
        return Holder()
