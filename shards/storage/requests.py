"""The files under a URL of any protocol that fsspec knows: requests, tried again when they fail."""

import errno
import io
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import fsspec

from t5vae.common.errors import UserError

DENIED = (401, 403)  # answers of HTTP servers
PAUSES = (0.2, 0.8)  # seconds between the tries of a request
MOST = 16 * 2**20  # bytes of a range
UNLISTED = (  # what the folder of a tokenizer may hold, where a server lists no folders
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Remote:
    """The files under a URL. A request that fails is tried three times.

    Every method raises FileNotFoundError where there is no file, OSError where it cannot be read.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise UserError(
                f"reading {url} needs another package: pip install 't5vae[remote]' ({error})"
            ) from None
        except ValueError as error:
            raise UserError(f"cannot open {url}: {error}") from None

    def get(self, name: str) -> bytes:
        """The content of a file."""
        return self._try(name, self._fs.cat_file)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """A range of a file, shorter than asked for where the file ends."""
        content = self._try(name, partial(self._fs.cat_file, start=offset, end=offset + size))
        if len(content) > size:
            raise OSError(
                errno.EIO,
                f"{self.url} sends only whole files: serve the dataset by another server (one that "
                "answers range requests) or copy it here",
            )
        return content

    def size(self, name: str) -> int:
        """Bytes of a file."""
        self.read(name, 0, 1)  # over HTTP, to fsspec's size() every failure is a missing file
        size = self._try(name, self._fs.size)
        if size is None:
            raise OSError(errno.EIO, f"the server of {self.url} does not tell the size of {name}")
        return size

    def folder(self, name: str) -> dict[str, bytes]:
        """The files of a folder and their contents."""
        try:
            paths = self._try(name, partial(self._fs.ls, detail=False))
        except OSError:
            paths = UNLISTED
        files = {path.removeprefix(f"{self._root}/{name}/") for path in paths}
        contents = {}
        for file in files:
            if file and not {"/", "?"} & set(file):  # what else a server's page links to
                with suppress(FileNotFoundError, PermissionError):
                    contents[file] = self.get(f"{name}/{file}")
        if not contents:
            raise FileNotFoundError(errno.ENOENT, f"{self.url}/{name} does not exist")
        return contents

    def _try(self, name: str, call: Callable[[str], Any]) -> Any:
        url = f"{self.url}/{name}"
        pauses = list(PAUSES)
        while True:
            try:
                return call(f"{self._root}/{name}")
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, f"{url} does not exist") from None
            except Exception as error:  # each protocol raises its own
                denied = isinstance(error, PermissionError) or getattr(error, "status", 0) in DENIED
                if denied or not pauses:
                    code = errno.EACCES if denied else errno.EIO
                    reason = str(error) or type(error).__name__
                    raise OSError(code, reason) from None
            time.sleep(pauses.pop(0))


class RemoteFile(io.RawIOBase):
    """A remote file, read from its beginning to its end by ranges of up to 16 MiB.

    Args:
        remote: where it lies.
        name: its name there.
        stop: an event that makes reading raise OSError.

    Attributes:
        url: the file's.
        size: its bytes.
    """

    def __init__(self, remote: Remote, name: str, stop: threading.Event | None = None):
        self.url = f"{remote.url}/{name}"
        self.size = remote.size(name)
        self._read = partial(remote.read, name)
        self._stop = stop or threading.Event()
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._stop.is_set():
            raise OSError(errno.ECANCELED, f"stopped reading {self.url}")
        size = min(len(buffer), MOST, self.size - self._at)
        content = self._read(self._at, size) if size else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
