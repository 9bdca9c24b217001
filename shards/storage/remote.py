"""A dataset at a URL: read by ranges at first, from this node's copies once they are made."""

import errno
import io
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import fsspec

from shards.storage.cache import CHUNK, Cache, CacheError, Copies
from shards.storage.store import LocalStore, Manifest
from t5vae.common.errors import DamageError, UserError
from t5vae.common.progress import say

DENIED = (401, 403)  # answers of HTTP servers
PAUSES = (0.2, 0.8)  # seconds between the tries of a request
BUSY = 0.1  # seconds until a file is tried again that another process copies
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
        size = min(len(buffer), CHUNK, self.size - self._at)
        content = self._read(self._at, size) if size else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class RemoteStore:
    """A dataset at a URL, as a `shards.storage.store.Store`.

    A shard that is not in the node's cache is read by ranges, at once; from then on one thread of
    this process copies shards into the cache in the order in which they were first asked for.

    Args:
        location: the URL.
        manifest: what the files must be; others are read from the URL each time.
        cache: the node's.

    Raises:
        UserError: see `Remote`.
    """

    readers = 16

    def __init__(self, location: str, manifest: Manifest, cache: Cache):
        self.location = location
        self._manifest = manifest
        self._remote = Remote(location)
        self._copies = Copies(cache, manifest.version)
        self._local = LocalStore(self._copies.folder)
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._wanted: SimpleQueue[str | None] | None = None
        self._stop: Callable[[], object] = lambda: None

    def get(self, name: str) -> bytes:
        if name not in self._manifest.sha256:
            return self._remote.get(name)
        try:
            source = partial(RemoteFile, self._remote, name)
            self._copies.make(name, self._manifest.sha256[name], source)
            self._copies.mark_used(name)
            return self._local.get(name)
        except (CacheError, FileNotFoundError):  # the latter: removed by another process just now
            return self._remote.get(name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            content = self._local.read(name, offset, size)
        except OSError:
            self._want(name)
            return self._remote.read(name, offset, size)
        self._copies.mark_used(name)
        return content

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(RemoteFile(self._remote, name), CHUNK))

    def folder(self, name: str) -> Path:
        return self._copies.make_folder(name, partial(self._remote.folder, name))

    def forget(self, name: str) -> bool:
        self._local.close()
        return self._copies.remove(name)

    def close(self) -> None:
        self._stop()
        self._local.close()
        with self._lock:
            self._asked, self._wanted = set(), None

    def _want(self, name: str) -> None:
        with self._lock:
            if name in self._asked:
                return
            self._asked.add(name)
            if self._wanted is None:
                self._wanted, stop = SimpleQueue(), threading.Event()
                self._stop = weakref.finalize(self, _end, self._wanted, stop)
                threading.Thread(
                    target=_copy,
                    args=(
                        self._remote,
                        self._copies,
                        self._manifest,
                        self._wanted,
                        self._asked,
                        stop,
                    ),
                    name="shards-cache",
                    daemon=True,
                ).start()
            self._wanted.put(name)


def _copy(
    remote: Remote,
    copies: Copies,
    manifest: Manifest,
    wanted: "SimpleQueue[str | None]",
    asked: set[str],
    stop: threading.Event,
) -> None:
    """The thread: it does not know the store, so that a dropped store can end it."""
    while (name := wanted.get()) is not None:
        source = partial(RemoteFile, remote, name, stop)
        try:
            if not copies.make(name, manifest.sha256[name], source, wait=False):
                wanted.put(name)
                stop.wait(BUSY)
        except CacheError as error:
            say(f"{error}; what it has no copy of is read from {remote.url}")
            return
        except DamageError as error:
            say(f"{error}; its blocks are read from there, one by one")
        except OSError:  # whoever reads the file will meet it too, and can name the block
            asked.discard(name)


def _end(wanted: "SimpleQueue[str | None]", stop: threading.Event) -> None:
    stop.set()
    wanted.put(None)
