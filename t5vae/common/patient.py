"""Files that are read on where their storage fails for a while."""

import io
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from t5vae.common.errors import UserError
from t5vae.common.openers import only_file
from t5vae.common.storage import patiently

Opened = tuple[io.RawIOBase, object]
"""A stream of bytes, and what is another once the file is."""


class PatientFile(io.RawIOBase):
    """A file that is opened afresh where reading fails, and read on from there.

    Args:
        name: the file's, for people.
        opener: opens it.

    Raises:
        StorageError: it failed for minutes; so does reading.
        UserError: it was changed meanwhile; so does reading.
        OSError: as the opener raises it.
    """

    def __init__(self, name: str, opener: Callable[[], Opened]):
        self._name, self._opener = name, opener
        self._at = 0
        self._stream: io.RawIOBase | None
        self._stream, self._same = patiently(opener, name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = patiently(lambda: self._try(lambda file: file.seek(offset, whence)), self._name)
        return self._at

    def readinto(self, buffer: Any) -> int:
        read = partial(self._try, lambda file: file.readinto(buffer))
        count: int = patiently(read, self._name)
        self._at += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _try(self, use: Callable[[Any], int]) -> int:
        try:
            if self._stream is None:
                self._stream, same = self._opener()
                if same != self._same:
                    raise UserError(f"{self._name} was changed while it was read: read it again")
                self._stream.seek(self._at)
            return use(self._stream)
        except OSError:
            self._drop()
            raise

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError):  # nothing was written to it
                stream.close()


def open_patiently(path: str | Path, *, grows: bool = False) -> io.BufferedReader:
    """Open a file of this machine for reading, as a `PatientFile`.

    Args:
        path: the file's.
        grows: it is a run's own, and lines may be added to it meanwhile.
    """

    def opened() -> Opened:
        opener = only_file if grows else None  # others may be pipes
        file = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115
        status = os.fstat(file.fileno())
        # Sizes and times as in a corpus's stamps: some mounts number their files anew.
        return file, status.st_ino if grows else (status.st_size, status.st_mtime_ns)

    return io.BufferedReader(PatientFile(str(path), opened))
