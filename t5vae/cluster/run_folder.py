"""The run's folder, made and locked: one run in it at a time."""

import json
import os
import secrets
from pathlib import Path
from typing import IO, Any

from t5vae.cluster.scheduler import host_name, is_running, job_id
from t5vae.common.errors import UserError
from t5vae.common.locks import Lock, take_lock
from t5vae.common.storage import patiently

LOCK = ".lock"
FOLDER = "folder"  # what a file of a run calls the folder that it was written in


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
        who = f" (job {before['job']} on {before['host']})" if before.get("job") else ""
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


def _take(folder: Path) -> tuple[IO[str] | None, dict[str, Any]]:
    """Lock a run's folder, and say so in the lock's file.

    Returns:
        The lock, None where another has it; and who had it before.
    """
    job = job_id()
    lock = open(folder / LOCK, "a+")  # noqa: SIM115 (held until the run ends)
    lock.seek(0)
    before = _holder(lock.read())
    before = {} if is_copied(before, folder) else before
    other = before.get("job") not in (None, job)
    if take_lock(lock) is Lock.ANOTHERS or (other and is_running(before["job"])):
        lock.close()
        return None, before
    holder = {
        "job": job,
        "host": host_name(),
        "token": secrets.token_hex(16),
        FOLDER: str(folder.absolute()),
    }
    lock.truncate(0)
    lock.write(json.dumps(holder) + "\n")
    lock.flush()
    os.fsync(lock.fileno())  # so that other hosts read it
    return lock, before


def is_copied(written: dict[str, Any], folder: Path) -> bool:
    """Whether what was written in a run's folder speaks of another, which still has its own.

    A folder that was moved is the run's own; so is one that an older version wrote in.
    """
    original = Path(written.get(FOLDER) or folder)
    return original.is_dir() and not original.samefile(folder)


def _holder(text: str) -> dict[str, Any]:
    """Who wrote a lock's file; empty where nobody did, or an older version."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
