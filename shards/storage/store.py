"""What a store is: the files of one dataset, wherever they lie."""

import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from t5vae.common.errors import UserError, first_line
from t5vae.common.storage import WEATHER

INDEX = "index.json"
SMALL = 64 * 2**20  # bytes of a file that is read whole, such as index.json, at most


class UnreadableError(UserError):
    """A file that cannot be read until its user mends something, such as its permissions."""


class Store(Protocol):
    """The files of one dataset, by their names; any thread may use it.

    Every method tries once, with all that it needs opened afresh: its caller tries again,
    `patiently`, what the storage fails to do for a while. It raises OSError where a file cannot be
    read, its number one of `WEATHER` where that may change, FileNotFoundError where there is none.
    `folder` and `forget` raise UserError where another dataset lies there by now.
    """

    location: str
    """The folder, for people: a path or a URL."""

    readers: int
    """How many threads are worth while to read ranges at the same time."""

    def get(self, name: str, most: int = SMALL) -> bytes:
        """The content of a small file, of at most so many bytes."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A range of a file, shorter than asked for where the file ends."""

    def open(self, name: str) -> BinaryIO:
        """A file, to be read from its beginning to its end: from where it lies, not from a copy.

        Reading is patient.
        """

    def folder(self, name: str) -> Path:
        """A folder of small files as a folder of this machine."""

    def forget(self, name: str) -> bool:
        """Of a file that is not what the manifest says, remove this machine's copy; whether there
        was one."""

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


def refuse_replaced(location: str, get: Callable[[str], bytes], version: str) -> None:
    """Refuse to go on with a dataset in whose place another was put.

    Args:
        location: for people.
        get: reads a file there.
        version: the sha256 of the index.json that was opened; "" where none was.

    Raises:
        UserError: another index.json lies there, or none.
        OSError: whether it was replaced cannot be told now, for it is the weather.
    """
    if not version:
        return
    try:
        content = get(INDEX)
    except FileNotFoundError:
        content = b""
    except OSError as error:
        if error.errno in WEATHER:
            raise
        return  # it cannot be told at all
    if hashlib.sha256(content).hexdigest() != version:
        raise UserError(
            f"{location} was replaced while it was read (its index.json is "
            f"{'another' if content else 'gone'}): bring back what was there to go on, or start a "
            "new run"
        )


def too_large(most: int) -> OSError:
    """What is raised of a file that is larger than it can be."""
    return OSError(errno.EFBIG, f"it has more than {most:,} bytes")


def unreadable(name: str, error: OSError) -> UnreadableError:
    """What is said of a file that cannot be read, though it is there and the weather is fine."""
    denied = error.errno in (errno.EACCES, errno.EPERM)
    mend = ": see to its permissions, or to your credentials" if denied else ""
    return UnreadableError(f"cannot read {name}: {first_line(error)}{mend}")
