"""The folder in which a build keeps what is done, so that the same command goes on after a halt."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from t5vae.common.errors import DISK_FULL, UserError, first_line
from t5vae.common.files import not_answering
from t5vae.common.locks import Lock, take_lock
from t5vae.common.progress import say
from t5vae.common.storage import WEATHER

LOCK = "lock"
SAME_START = 2.0  # seconds by which the start of one process may differ, as the clock is set


@contextmanager
def work_folder(out: Path, is_of_use: Callable[[Path], bool]) -> Iterator[Path]:
    """Make `.NAME.build` beside `out`, or take it up again, for this process alone.

    It is removed at the end, and after a UserError where nothing in it is of use; whatever else
    halts a build leaves it. On a file system without locks it is refused while a process of this
    host that has it is alive.

    Args:
        out: what is built.
        is_of_use: whether what lies in the folder spares a later build some work.

    Raises:
        UserError: another process has it, no space is left, a worker died, or nothing can be
            written there.
        StorageError: the storage fails.
    """
    place = out.resolve()
    folder = place.with_name(f".{place.name}.build")
    go_on = f"run the same command again to go on, or remove {folder}"
    try:
        with _claimed(folder, out):
            try:
                yield folder
            except UserError as error:
                if is_of_use(folder):
                    error.args = (f"{error}; what is done is kept: then {go_on}",)
                else:
                    _clear(folder)
                raise
            _clear(folder)
    except KeyboardInterrupt:
        say(f"stopped: {go_on}")
        raise
    except BrokenProcessPool:
        raise UserError(
            f"a worker died, perhaps for want of memory: choose fewer --workers and {go_on}"
        ) from None
    except OSError as error:
        if error.errno in WEATHER:
            raise not_answering(str(out), error) from error
        if error.errno in DISK_FULL:
            raise UserError(f"no space left for {out}: make room and {go_on}") from None
        raise UserError(f"cannot write {out}: {error}: mend that and {go_on}") from None


@contextmanager
def _claimed(folder: Path, out: Path) -> Iterator[None]:
    """Make the folder and have it; in the end it goes if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / LOCK, "a+") as file:
            _claim(file, out)
            try:
                yield
            finally:
                with suppress(OSError):
                    _write(file, {})
    finally:
        with suppress(OSError):
            folder.rmdir()


def _claim(file: IO[str], out: Path) -> None:
    state = take_lock(file)
    if not os.fstat(file.fileno()).st_nlink:  # whoever had it has just removed it
        state = Lock.ANOTHERS
    holder = _holder(file) if state is Lock.NONE else {}
    if state is Lock.ANOTHERS or _is_alive(holder):
        raise UserError(f"another process is building {out}: wait for it")
    if holder.get("host", _host()) != _host():
        say(
            f"this file system has no locks, and {holder['host']} began to build {out}: going on; "
            "stop this if it still does"
        )
    _write(file, {"host": _host(), "process": os.getpid(), "started": _started(os.getpid())})


def _holder(file: IO[str]) -> dict[str, Any]:
    """Who has the folder, or died with it."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(file: IO[str], holder: dict[str, Any]) -> None:
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether another process of this host has the folder."""
    process = holder.get("process")
    if process in (None, os.getpid()) or holder.get("host") != _host():
        return False
    try:
        return abs(_started(process) - holder["started"]) < SAME_START
    except psutil.NoSuchProcess:
        return False


def _host() -> str:
    return socket.gethostname()


def _started(process: int) -> float:
    return psutil.Process(process).create_time()


def _clear(folder: Path) -> None:
    """Remove what is in the folder, the lock last; a mount that keeps some of it fails no build."""
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        say(f"cannot remove {folder} ({first_line(error)}): remove it")
