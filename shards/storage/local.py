"""A dataset in a folder of this machine."""

import os
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from shards.storage.store import refuse_replaced
from t5vae.common.patient import open_patiently

OPEN_FILES = 64


class LocalStore:
    """A dataset folder on this machine. At most 64 files are held open.

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

    def get(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(name, None) or FileIO(self.path / name)
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
        return open_patiently(self.path / name)

    def folder(self, name: str) -> Path:
        refuse_replaced(self.location, self.get, self._version)
        return self.path / name

    def forget(self, name: str) -> bool:
        refuse_replaced(self.location, self.get, self._version)
        return False

    def close(self) -> None:
        with self._lock:
            self._files.clear()


def _range(file: int, offset: int, size: int) -> bytes:
    """A range of an open file, which some file systems give piece by piece."""
    parts = []
    while size > 0 and (part := os.pread(file, size, offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)
