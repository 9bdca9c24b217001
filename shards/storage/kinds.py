"""The kinds of stores, by the scheme of a dataset's location."""

from collections.abc import Callable

from shards.storage.cache import Cache
from shards.storage.local import LocalStore
from shards.storage.store import Manifest, Store

Kind = Callable[[str, Manifest, Cache | None], Store]


def _local(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    return LocalStore(location.removeprefix("file://"))


def _of_fsspec(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    from shards.storage.remote import RemoteStore  # imports fsspec

    return RemoteStore(location, manifest, cache or Cache())


KINDS: dict[str, Kind] = {"file": _local}
ANY_OTHER: Kind = _of_fsspec


def open_store(
    location: str, manifest: Manifest | None = None, cache: Cache | None = None
) -> Store:
    """The store of a dataset.

    Args:
        location: a folder, or a URL of a scheme in `KINDS` or of a protocol that fsspec knows.
        manifest: what its files must be; without it nothing of a URL is kept in the cache.
        cache: where copies of a URL's files are kept; by default `Cache()`.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    scheme, separator, _ = location.partition("://")
    kind = KINDS.get(scheme if separator else "file", ANY_OTHER)
    return kind(location, manifest or Manifest("", {}), cache)
