"""A dataset at a URL: read by ranges at first, from this node's copies once they are made."""

import errno
import io
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, cast

from shards.storage.cache import Cache, CacheError, Copies
from shards.storage.local import LocalStore
from shards.storage.requests import MOST, Remote, RemoteFile, Result
from shards.storage.store import SMALL, Manifest, refuse_replaced, too_large
from t5vae.common.errors import DamageError, StorageError, UserError
from t5vae.common.progress import say
from t5vae.common.storage import patiently

BUSY = 0.1  # seconds until a file is tried again that another process copies


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

    def get(self, name: str, most: int = SMALL) -> bytes:
        if name not in self._manifest.sha256:
            return self._remote.get(name, most)

        def source() -> RemoteFile:
            file = RemoteFile(self._remote, name)
            if file.size > most:
                raise too_large(most)
            return file

        try:
            self._copies.make(name, self._manifest.sha256[name], source)
            self._copies.mark_used(name)
        except (CacheError, FileNotFoundError):
            return self._remote.read(name, 0, most)
        try:
            return self._local.get(name, most)
        except OSError:  # removed by another process just now, or the node's disk fails
            return self._remote.read(name, 0, most)

    def read(self, name: str, offset: int, size: int) -> bytes:
        try:
            content = self._local.read(name, offset, size)
        except OSError:
            self._want(name)
            return self._remote.read(name, offset, size)
        self._copies.mark_used(name)
        return content

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(RemoteFile(self._remote, name, patiently), MOST))

    def folder(self, name: str) -> Path:
        return self._copies.make_folder(name, partial(self._contents, name))

    def forget(self, name: str) -> bool:
        refuse_replaced(self.location, self._remote.get, self._manifest.version)
        self._local.close()
        return self._copies.remove(name)

    def close(self) -> None:
        self._stop()
        self._local.close()
        with self._lock:
            self._asked, self._wanted = set(), None

    def _contents(self, name: str) -> dict[str, bytes]:
        contents = self._remote.folder(name)
        refuse_replaced(self.location, self._remote.get, self._manifest.version)
        return contents

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

    def request(attempt: Callable[[], Result], name: str) -> Result:
        def unless_stopped() -> Result:
            try:
                if not stop.is_set():
                    return attempt()
            except OSError:  # it may be for the end that it failed
                if not stop.is_set():
                    raise
            raise OSError(errno.ECANCELED, f"stopped reading {name}")

        return patiently(unless_stopped, name)

    while (name := wanted.get()) is not None:
        source = partial(RemoteFile, remote, name, request)
        try:
            if not copies.make(name, manifest.sha256[name], source, wait=False):
                wanted.put(name)
                stop.wait(BUSY)
        except CacheError as error:
            say(f"{error}; what it has no copy of is read from {remote.url}")
            return
        except DamageError as error:
            try:
                with suppress(OSError):
                    refuse_replaced(remote.url, remote.get, manifest.version)
            except UserError:  # whoever reads it says so
                return
            say(f"{error}; its blocks are read from there, one by one")
        # Whoever reads the file will meet it too, and can name the block.
        except (OSError, StorageError):
            asked.discard(name)


def _end(wanted: "SimpleQueue[str | None]", stop: threading.Event) -> None:
    stop.set()
    wanted.put(None)
