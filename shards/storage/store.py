"""What a store is: the files of one dataset, wherever they lie."""

from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol


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
