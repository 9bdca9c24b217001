"""The folder in which a build keeps what is done, so that the same command goes on after a halt.

What is in it is trusted. So it holds its own number, which a folder does not have that somebody
copied here, or put here for us: such a folder is cleared before use.
"""

import errno
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from t5vae.common.errors import DISK_FULL, UserError, first_line
from t5vae.common.files import not_answering
from t5vae.common.locks import Lock, open_lock, take_lock
from t5vae.common.owners import is_mine
from t5vae.common.progress import say
from t5vae.common.storage import WEATHER

LOCK = "lock"
MOST = 4096  # characters that the lock holds
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not stat.S_ISDIR(os.lstat(folder).st_mode) or not is_mine(folder):
        raise UserError(f"{folder} is no folder of yours: remove it")
    try:
        with _open_lock(folder) as file:
            number = os.stat(folder).st_ino
            if _claim(file, out, number) != number:
                _clear(folder, but=LOCK)
            try:
                yield
            finally:
                with suppress(OSError):
                    _write(file, {"folder": number})
    finally:
        with suppress(OSError):
            folder.rmdir()


def _open_lock(folder: Path) -> IO[str]:
    try:
        return open_lock(folder / LOCK)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UserError(f"{error.strerror}: remove {folder}") from None
        raise


def _claim(file: IO[str], out: Path, number: int) -> Any:
    """Have a folder of that number; returns the one that is noted in it."""
    state = take_lock(file)
    if not os.fstat(file.fileno()).st_nlink:  # whoever had it has just removed it
        state = Lock.ANOTHERS
    noted = {} if state is Lock.ANOTHERS else _holder(file)
    holder = noted if state is Lock.NONE else {}
    if state is Lock.ANOTHERS or _is_alive(holder):
        raise UserError(f"another process is building {out}: wait for it")
    if holder.get("host", _host()) != _host():
        say(
            f"this file system has no locks, and {holder['host']} began to build {out}: going on; "
            "stop this if it still does"
        )
    mine = {"host": _host(), "process": os.getpid(), "started": _started(os.getpid())}
    _write(file, mine | {"folder": number})
    return noted.get("folder")


def _holder(file: IO[str]) -> dict[str, Any]:
    """Who has the folder, or died with it."""
    file.seek(0)
    try:
        holder = json.loads(file.read(MOST))
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and str(holder.get("host")).isprintable() else {}


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
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def _host() -> str:
    return socket.gethostname()


def _started(process: int) -> float:
    return psutil.Process(process).create_time()


def _clear(folder: Path, but: str = "") -> None:
    """Remove what is in the folder, the lock last; a mount that keeps some of it fails no build."""
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            if path.name != but:
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink()
    except OSError as error:
        say(f"cannot remove {folder} ({first_line(error)}): remove it")
