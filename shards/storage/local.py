"""A dataset in a folder of this machine."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from shards.storage.store import SMALL, refuse_replaced, too_large
from t5vae.common.patient import open_patiently

OPEN_FILES = 64


class LocalStore:
    """A dataset folder on this machine. At most 64 files are held open.

    The folder may come from a stranger: a file of it is a regular one, inside of it.

    Args:
        location: the folder.
        version: the sha256 of its index.json; "" for any.
    """

    readers = 1

    def __init__(self, location: str | Path, version: str = ""):
        self.location = str(location)
        self._version = version
        self.path = Path(location)
        self._lock = Lock()
        self._files: dict[str, FileIO] = {}  # the one used last comes last

    def get(self, name: str, most: int = SMALL) -> bytes:
        with open(regular(self.path / name, self.path), "rb") as file:
            if os.fstat(file.fileno()).st_size > most or len(content := file.read(most + 1)) > most:
                raise too_large(most)
        return content

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(name, None) or FileIO(regular(self.path / name, self.path))
            self._files[name] = file
            if len(self._files) > OPEN_FILES:
                del self._files[next(iter(self._files))]  # closed once no thread reads it any more
        try:
            return _range(file.fileno(), offset, size)
        except OSError:  # the next try opens the file afresh: this descriptor may be stale
            with self._lock:
                if self._files.get(name) is file:
                    del self._files[name]
            raise

    def open(self, name: str) -> BinaryIO:
        return open_patiently(regular(self.path / name, self.path))

    def folder(self, name: str) -> Path:
        refuse_replaced(self.location, self.get, self._version)
        refuse_outside(self.path / name, self.path)
        return self.path / name

    def forget(self, name: str) -> bool:
        refuse_replaced(self.location, self.get, self._version)
        return False

    def close(self) -> None:
        with self._lock:
            self._files.clear()


def regular(path: Path, folder: Path) -> Path:
    """The path of a file in a folder.

    Raises:
        OSError: there is none, it is no regular file, or it is a link that leads out of the folder.
    """
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        refuse_outside(path, folder)
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return path


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuse a path that links lead out of a folder; those of the Hub's cache lead to its blobs.

    Raises:
        OSError: it does.
    """
    home = Path(os.path.realpath(folder))
    places = [
        home,
        *(
            each.parents[1] / "blobs"
            for each in (home, *home.parents)
            if each.parent.name == "snapshots"
        ),
    ]
    if not any(map(Path(os.path.realpath(path)).is_relative_to, places)):
        raise OSError(
            errno.EINVAL, "it is a link that leads out of its folder: put the file itself there"
        )


def _range(file: int, offset: int, size: int) -> bytes:
    """A range of an open file, which some file systems give piece by piece."""
    parts = []
    while size > 0 and (part := os.pread(file, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)
