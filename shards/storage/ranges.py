"""Ranges of remote files, kept by a node: each is fetched once, by whichever process asks first.

Beside a dataset's whole copies (`shards.storage.cache`), FOLDER/VERSION/NAME is a sparse file that
holds at their places the ranges of a remote file that were read; NAME.ranges tells which these are,
as (offset, size) at the place of every 512th byte: a shard's blocks lie further apart. What
processes ask for at the same time, they ask for by turns, by locks of which there are a few for all
ranges. Neither file is synced: what a range holds its reader checks, and `forget`s.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

from shards.storage.cache import CacheError, Copies
from t5vae.common.locks import Lock, open_lock, take_lock
from t5vae.common.progress import say

KNOWN = ".ranges"
SPACING = 512  # bytes from one range's begin to the next one's, at least: a record of tar
ENTRY = struct.Struct("<qq")
LOCKS = 256
TURN, BUSY = 20.0, 0.01  # seconds to wait for another process that fetches, and between two looks


class RangeCache:
    """The ranges of one dataset's files.

    Args:
        copies: where the node keeps the dataset's files.
        url: of the dataset, for people.
    """

    def __init__(self, copies: Copies, url: str):
        self._copies, self._url = copies, url
        self._is_full = threading.Event()

    def read(self, name: str, offset: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """A range: this node's copy, or what is fetched, of which a copy is kept.

        Args:
            name: of a file.
            offset, size: of the range; others must not begin within its first 512 bytes.
            fetch: gets it from afar.

        Raises:
            OSError: as `fetch` does.
        """
        content = None
        try:
            content = self._known(name, offset, size)
            if content is None and not self._is_full.is_set():
                with self._turn(name, offset):
                    content = self._known(name, offset, size)
                    if content is None:
                        content = fetch()
                        self._keep(name, offset, content)
        except CacheError as error:
            if not self._is_full.is_set():
                self._is_full.set()
                say(f"{error}; what it has no copy of is read from {self._url}")
        return fetch() if content is None else content

    def forget(self, name: str) -> bool:
        """Remove what is kept of a file; whether there was anything."""
        with suppress(FileNotFoundError):
            os.unlink(self._copies.folder / (name + KNOWN))
        return self._copies.remove(name)

    def _known(self, name: str, offset: int, size: int) -> bytes | None:
        copy = self._copies.folder / name
        if not self._copies.is_there(copy):
            return None
        try:
            with _opened(Path(f"{copy}{KNOWN}"), os.O_RDONLY) as known:
                entry = os.pread(known, ENTRY.size, offset // SPACING * ENTRY.size)
            if entry != ENTRY.pack(offset, size):
                return None
            with _opened(copy, os.O_RDONLY) as kept:
                content = os.pread(kept, size, offset)
        except OSError:  # none yet, removed just now, or the node's disk fails
            return None
        self._copies.mark_used(name)
        return content if len(content) == size else None

    def _keep(self, name: str, offset: int, content: bytes) -> None:
        copy = self._copies.folder / name
        self._copies.make_room(len(content))
        with self._copies.writing():
            with _opened(copy, os.O_WRONLY | os.O_CREAT) as kept:
                _write(kept, content, offset)
            with _opened(Path(f"{copy}{KNOWN}"), os.O_WRONLY | os.O_CREAT) as known:
                entry = ENTRY.pack(offset, len(content))
                _write(known, entry, offset // SPACING * ENTRY.size)

    @contextmanager
    def _turn(self, name: str, offset: int) -> Iterator[None]:
        """Wait for another process that fetches the range, but not for ever: it may be stopped."""
        number = crc32(f"{name} {offset}".encode()) % LOCKS
        with self._copies.writing():
            lock = open_lock(self._copies.folder / f"ranges-{number:03}.lock")
        with lock:
            patience = time.monotonic() + TURN
            while time.monotonic() < patience:
                with self._copies.writing():
                    if take_lock(lock) is not Lock.ANOTHERS:
                        break
                time.sleep(BUSY)
            yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(file: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
