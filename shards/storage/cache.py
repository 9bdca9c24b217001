"""A node's cache of remote files, shared by all its processes: small ones are copied whole.

FOLDER/VERSION/NAME is the copy of a dataset's file; beside it lie NAME.lock, and NAME.part while it
is being made. No other user can write to VERSION. On a file system without locks each process makes
its own NAME.TOKEN.part: what two copy at once is the same. Of shards ranges are kept, see
`shards.storage.ranges`.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from t5vae.common.errors import DamageError, UserError
from t5vae.common.locks import Lock, open_lock, take_lock
from t5vae.common.owners import is_mine

CHUNK = 16 * 2**20  # bytes copied at once
ABANDONED = 3600.0  # seconds since a process wrote to a part of its own: it was killed
LOCK, PART = ".lock", ".part"
VERSION = re.compile(r"[0-9a-f]{64}")


class CacheError(UserError):
    """The cache cannot take a file; the line says why, and how to mend it."""


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("T5VAE_CACHE") or f"{home}/t5vae").expanduser()


@dataclass(frozen=True)
class Cache:
    """A folder of this node for copies of remote files.

    Attributes:
        folder: by default $T5VAE_CACHE, else t5vae in $XDG_CACHE_HOME or ~/.cache.
        limit_bytes: the most it may hold: 256 GiB by default.
    """

    folder: Path = field(default_factory=_default_folder)
    limit_bytes: int = 256 * 2**30


class Source(Protocol):
    """A remote file that is read from its beginning to its end."""

    url: str
    size: int

    def read(self, size: int, /) -> bytes | None:
        """The next bytes, at most so many; none at the end."""


class Copies:
    """The copies of one dataset's files.

    Args:
        cache: the node's.
        version: the sha256 of the dataset's index.json.

    Attributes:
        folder: where the copies lie.
    """

    def __init__(self, cache: Cache, version: str):
        self.cache = cache
        self.folder = cache.folder / version
        self._used: set[str] = set()
        self._room = 0  # bytes that this process may add before it looks at the limit again
        self._counting = threading.Lock()

    def make(
        self,
        name: str,
        sha256: str,
        source: Callable[[], AbstractContextManager[Source]],
    ) -> None:
        """Copy a file, unless there is a copy.

        Args:
            name: the file's.
            sha256: what its content must have; "" where that is not known.
            source: opens the remote file.

        Raises:
            CacheError: no space, or the node's disk fails.
            DamageError: twice, the content was another.
            OSError: the remote file cannot be read.
        """
        copy = self.folder / name
        if self.is_there(copy):
            return
        with self._locked(copy) as state:
            if self.is_there(copy):
                return
            part = self._part(copy, state)
            try:
                for _ in range(2):
                    with source() as file:
                        written = self._write(part, file)
                        if written == (sha256 or written):
                            with self.writing():
                                part.rename(copy)
                            return
            finally:
                with suppress(OSError):
                    part.unlink()
        raise DamageError(f"{file.url} is not what index.json names (its sha256 differs)")

    def make_folder(self, name: str, contents: Callable[[], dict[str, bytes]]) -> Path:
        """Copy a folder of small files, unless there is a copy.

        Raises:
            CacheError: no space, or the node's disk fails.
            OSError: as `contents` raises it.
        """
        copy = self.folder / name
        if not self.is_there(copy):
            with self._locked(copy) as state:
                if not self.is_there(copy):
                    self._write_folder(copy, self._part(copy, state), contents())
        return copy

    def mark_used(self, name: str) -> None:
        """Let the cache know that a copy is in use, once a process: those unused longest go."""
        if name not in self._used:
            self._used.add(name)
            with suppress(OSError):
                os.utime(self.folder / name)

    def remove(self, name: str) -> bool:
        """Remove a copy; whether there was one."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def is_there(self, copy: Path) -> bool:
        """Whether there is a copy.

        Raises:
            CacheError: it is a link or another user's, or the folder of the copies is.
        """
        with self.writing():
            self.own_folder()
            try:
                _refuse_others(copy)
            except FileNotFoundError:
                return False
            return True

    def own_folder(self) -> None:
        """Make the folder of the copies, of which no other user can change anything."""
        top = self.cache.folder
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = os.stat(top).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(errno.EACCES, f"any user may rename what is in {top}")
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        _refuse_others(self.folder)
        status = os.lstat(self.folder)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, f"{self.folder} is no folder")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            self.folder.chmod(0o700)

    def _write(self, part: Path, source: Source) -> str:
        digest = hashlib.sha256()
        with self.writing():
            part.unlink(missing_ok=True)
            file = open(part, "xb", buffering=0)  # noqa: SIM115 closed below
        with file:
            self._reserve(file.fileno(), source.size)
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                rest = memoryview(chunk)
                with self.writing():
                    while rest:
                        rest = rest[file.write(rest) :]
            with self.writing():
                file.truncate()
                os.fsync(file.fileno())
        return digest.hexdigest()

    def _write_folder(self, copy: Path, part: Path, contents: dict[str, bytes]) -> None:
        with self.writing():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(mode=0o700)
            for name, content in contents.items():
                (part / name).write_bytes(content)
            try:
                part.rename(copy)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                if not copy.is_dir():  # another process was faster
                    raise

    def _part(self, copy: Path, state: Lock) -> Path:
        """The name of a copy that is being made; what a killed process left of it goes."""
        if state is Lock.MINE:
            return Path(f"{copy}{PART}")
        for part in copy.parent.glob(f"{copy.name}.*{PART}"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        return Path(f"{copy}.{secrets.token_hex(8)}{PART}")

    def _reserve(self, part: int, size: int) -> None:
        """Set a part's size, so that others count it, after making room for it."""
        with self._locked(self.cache.folder / "all"), self.writing():
            self._free(size)
            os.truncate(part, size)

    def make_room(self, size: int) -> None:
        """Make room for bytes that are added to files of this dataset.

        All files are counted once in a while: each time a process is given a sixteenth of what is
        free.

        Raises:
            CacheError: there is none, or the node's disk fails.
        """
        with self._counting:
            if self._room < size:
                with self._locked(self.cache.folder / "all"), self.writing():
                    self._room = max(size, self._free(size) // 16)
            self._room -= size

    def _free(self, size: int) -> int:
        """Remove what others used longest ago until so many bytes are free; how many are."""
        used = 0
        others = []
        for path, status in _files(self.cache.folder):
            bytes = status.st_size
            if path.suffix != PART:  # of which all is reserved
                bytes = min(bytes, status.st_blocks * 512)
            used += bytes
            if path.parent.parent == self.cache.folder and path.parent != self.folder:
                others.append((status.st_mtime, bytes, path))
        free = self.cache.limit_bytes - used
        if free + sum(bytes for _, bytes, _ in others) < size:
            raise CacheError(
                f"the cache {self.cache.folder} is full (its limit is "
                f"{self.cache.limit_bytes:,} bytes)"
            )
        for _, bytes, path in sorted(others):
            if free >= size:
                break
            path.unlink(missing_ok=True)  # a process that has it open goes on reading it
            free += bytes
        return free

    @contextmanager
    def _locked(self, path: Path) -> Iterator[Lock]:
        """Hold a file's lock, where there are any; a killed process holds none."""
        with self.writing():
            self.own_folder()
            file = open_lock(Path(f"{path}{LOCK}"))
        with file:
            with self.writing():
                state = take_lock(file, wait=True)
            yield state

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise what fails inside as a CacheError."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"cannot write to the cache {self.cache.folder}: {error.strerror}: free some space "
                "or choose another folder (T5VAE_CACHE)"
            ) from None


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """This user's copies of all versions, and what is being copied."""
    for version in folder.iterdir():
        if not VERSION.fullmatch(version.name) or not _is_own(version):
            continue
        for parent, _, names in os.walk(version):
            for name in names:
                path = Path(parent, name)
                if path.suffix != LOCK:
                    with suppress(FileNotFoundError):  # renamed or removed just now
                        yield path, path.lstat()


def _is_own(path: Path) -> bool:
    try:
        _refuse_others(path)
    except OSError:
        return False
    return True


def _refuse_others(path: Path) -> None:
    """Refuse a link, or what belongs to another user.

    Raises:
        OSError: it is one.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path} is a link")
    if not is_mine(path):
        raise PermissionError(errno.EACCES, f"{path} belongs to another user")
