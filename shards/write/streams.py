"""Files of a corpus as streams: opened wherever they lie, hashed, decompressed."""

import errno
import gzip
import hashlib
import io
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from t5vae.common.errors import first_line
from t5vae.common.patient import Opened, PatientFile, open_patiently

CHUNK = 2**20  # bytes
DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")


class Tap(io.RawIOBase):
    """A stream's bytes, counted and hashed on their way."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._hash = hashlib.sha256()
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self._hash.update(memoryview(buffer)[:count])
        self._count += count
        return count

    def tell(self) -> int:
        return self._count

    def hexdigest(self) -> str:
        """The sha256 of all bytes so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._stream.close()
        super().close()


def is_url(source: object) -> bool:
    """Whether a source is one for fsspec."""
    return "://" in str(source)


class _UrlFile(io.RawIOBase):
    """A file at an fsspec URL; whatever goes wrong is an OSError."""

    def __init__(self, url: str):
        with storage_errors():
            from fsspec.core import url_to_fs

            filesystem, inner = url_to_fs(url)
            self._stream = filesystem.open(inner, "rb")
        self.size = getattr(self._stream, "size", None)

    def readinto(self, buffer: Any) -> int:
        with storage_errors():
            return self._stream.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with storage_errors():
            return self._stream.seek(offset, whence)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_raw(path: str) -> io.BufferedReader:
    """Open a path or an fsspec URL, to be read on where the storage fails for a while.

    Raises:
        StorageError: it fails for minutes.
        OSError: that fails otherwise.
    """
    if not is_url(path):
        return open_patiently(path)

    def opened() -> Opened:
        file = _UrlFile(path)
        return file, file.size

    return io.BufferedReader(PatientFile(path, opened))


def is_pipe(source: str | Path) -> bool:
    """Whether a source can be read once and by this process alone: "-", /dev/stdin, `<(zcat x)`."""
    if str(source) == "-" or str(source).startswith(DESCRIPTORS):
        return True
    try:
        mode = Path(source).stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def copy_pipe(source: str | Path, folder: Path) -> Path:
    """Copy a pipe, "-" for standard input, into a file, to be read as often as need be."""
    copy = folder / "stdin"
    with open(copy, "wb") as file:
        if str(source) == "-":
            shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            with open(source, "rb") as pipe:
                shutil.copyfileobj(pipe, file)
    return copy


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise the errors of fsspec and of what is behind it, each with its own kinds, as OSError."""
    try:
        yield
    except TimeoutError as error:  # asyncio's has no number
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
    except OSError:
        raise
    except Exception as error:
        from shards.storage.requests import error_number

        raise OSError(error_number(error), first_line(error)) from error


def decompressed(raw: io.RawIOBase, path: str) -> IO[bytes]:
    """The bytes in a file, by its name's ending (.gz, .zst); a file cut short raises."""
    buffered = io.BufferedReader(raw, CHUNK)
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if path.lower().endswith(".zst"):
        import pyarrow

        stream = pyarrow.input_stream(buffered, compression="zstd")  # reads all frames, sees a cut
        return io.BufferedReader(stream)
    return buffered


def drain(stream: IO[bytes] | io.RawIOBase) -> None:
    """Read what is left."""
    while stream.read(CHUNK):
        pass
