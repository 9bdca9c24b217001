"""Where a dataset's files lie: a folder of this machine."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, Protocol

OPEN_FILES = 64


class Store(Protocol):
    """The files of one dataset folder, by their names in it.

    Every method raises OSError where a file cannot be read, FileNotFoundError where there is none.
    """

    location: str
    """The folder, for people: a path or a URL."""

    def get(self, name: str) -> bytes:
        """The content of a small file."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A range of a file, shorter than asked for where the file ends."""

    def open(self, name: str) -> BinaryIO:
        """A file, to be read from its beginning to its end."""

    def folder(self, name: str) -> Path:
        """A folder of small files as a folder of this machine."""

    def close(self) -> None:
        """Close what is open; a later read opens it again."""


class LocalStore:
    """A dataset folder on this machine. At most 64 files are held open."""

    def __init__(self, location: str):
        self.location = location
        self.path = Path(location)
        self._open: OrderedDict[str, int] = OrderedDict()

    def get(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str, offset: int, size: int) -> bytes:
        if name not in self._open:
            self._open[name] = os.open(self.path / name, os.O_RDONLY)
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(name)
        return os.pread(self._open[name], size, offset)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def folder(self, name: str) -> Path:
        return self.path / name

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def open_store(location: str) -> Store:
    """The store of a dataset folder."""
    return LocalStore(location)
