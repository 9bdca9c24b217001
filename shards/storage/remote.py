"""A dataset at a URL: read by ranges, of which this node keeps copies."""

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from shards.storage.cache import Cache, CacheError, Copies
from shards.storage.local import LocalStore
from shards.storage.ranges import RangeCache
from shards.storage.requests import MOST, Remote, RemoteFile
from shards.storage.store import INDEX, SMALL, Manifest, refuse_replaced, too_large
from t5vae.common.storage import patiently


class RemoteStore:
    """A dataset at a URL, as a `shards.storage.store.Store`.

    Args:
        location: the URL.
        manifest: what the files must be; of others index.json alone is copied.
        cache: the node's.

    Raises:
        UserError: see `Remote`.
    """

    readers = 16

    def __init__(self, location: str, manifest: Manifest, cache: Cache):
        self.location = location
        self._manifest, self._cache = manifest, cache
        self._remote = Remote(location)
        self._copies = Copies(cache, manifest.version)
        self._ranges = RangeCache(self._copies, location)

    def get(self, name: str, most: int = SMALL) -> bytes:
        if name in self._manifest.sha256:
            return self._copied(self._copies, name, self._manifest.sha256[name], most)
        stamp = self._remote.stamp(name) if name == INDEX else ""
        if not stamp:
            return self._remote.get(name, most)
        version = hashlib.sha256(f"{self.location} {stamp}".encode()).hexdigest()
        return self._copied(Copies(self._cache, version), name, "", most)

    def read(self, name: str, offset: int, size: int) -> bytes:
        fetch = partial(self._remote.read, name, offset, size)
        return self._ranges.read(name, offset, size, fetch)

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(RemoteFile(self._remote, name, patiently), MOST))

    def folder(self, name: str) -> Path:
        return self._copies.make_folder(name, partial(self._contents, name))

    def forget(self, name: str) -> bool:
        refuse_replaced(self.location, self._remote.get, self._manifest.version)
        return self._ranges.forget(name)

    def close(self) -> None:
        """Nothing is held open."""

    def _copied(self, copies: Copies, name: str, sha256: str, most: int) -> bytes:
        """A small file's content, from this node's copy, which is made."""

        def source() -> RemoteFile:
            file = RemoteFile(self._remote, name)
            if file.size > most:
                raise too_large(most)
            return file

        try:
            copies.make(name, sha256, source)
            copies.mark_used(name)
        except (CacheError, FileNotFoundError):
            return self._remote.read(name, 0, most)
        try:
            return LocalStore(copies.folder).get(name, most)
        except OSError:  # removed by another process just now, or the node's disk fails
            return self._remote.read(name, 0, most)

    def _contents(self, name: str) -> dict[str, bytes]:
        contents = self._remote.folder(name)
        refuse_replaced(self.location, self._remote.get, self._manifest.version)
        return contents
