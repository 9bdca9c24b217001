"""Where a dataset's files lie: a folder of this machine, or a URL (see shards.storage.remote)."""

import os
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

if TYPE_CHECKING:
    from shards.storage.cache import Cache

OPEN_FILES = 64


class Store(Protocol):
    """The files of one dataset, by their names; any thread may use it.

    Every method raises OSError where a file cannot be read, FileNotFoundError where there is none.
    """

    location: str
    """The folder, for people: a path or a URL."""

    readers: int
    """How many threads are worth while to read ranges at the same time."""

    def get(self, name: str) -> bytes:
        """The content of a small file."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A range of a file, shorter than asked for where the file ends."""

    def open(self, name: str) -> BinaryIO:
        """A file, to be read from its beginning to its end: from where it lies, not from a copy."""

    def folder(self, name: str) -> Path:
        """A folder of small files as a folder of this machine."""

    def forget(self, name: str) -> bool:
        """Remove this machine's copy of a remote file; whether there was one."""

    def close(self) -> None:
        """Close what is open; a later read opens it again."""


class Manifest(NamedTuple):
    """What a dataset's files must be.

    Attributes:
        version: the sha256 of index.json.
        sha256: of blocks.npy and of each shard, by name.
    """

    version: str
    sha256: dict[str, str]


class LocalStore:
    """A dataset folder on this machine. At most 64 files are held open."""

    readers = 1

    def __init__(self, location: str | Path):
        self.location = str(location)
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
        return os.pread(file.fileno(), size, offset)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def folder(self, name: str) -> Path:
        return self.path / name

    def forget(self, name: str) -> bool:
        return False

    def close(self) -> None:
        with self._lock:
            self._files.clear()


def open_store(
    location: str, manifest: Manifest | None = None, cache: "Cache | None" = None
) -> Store:
    """The store of a dataset.

    Args:
        location: a folder, or a URL of any protocol that fsspec knows.
        manifest: what its files must be; without it nothing of a URL is kept in the cache.
        cache: where copies of a URL's files are kept; by default `Cache()`.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    path = location.removeprefix("file://")
    if "://" not in path:
        return LocalStore(path)
    from shards.storage.cache import Cache
    from shards.storage.remote import RemoteStore

    return RemoteStore(location, manifest or Manifest("", {}), cache or Cache())
