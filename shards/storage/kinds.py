"""The kinds of stores, by the scheme of a dataset's location."""

from collections.abc import Callable

from shards.storage.cache import Cache
from shards.storage.local import LocalStore
from shards.storage.store import Manifest, Store


def open_store(
    location: str, manifest: Manifest | None = None, cache: Cache | None = None
) -> Store:
    """The store of a dataset.

    Args:
        location: a folder, or a URL of any protocol that fsspec knows.
        manifest: what its files must be; without it nothing of a URL is kept in the cache.
        cache: where copies of a URL's files are kept; by default `Cache()`.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed.
    """
    scheme, separator, _ = location.partition("://")
    kind = KINDS.get(scheme if separator else "file", _remote)
    return kind(location, manifest or Manifest("", {}), cache)


def _local(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    return LocalStore(location.removeprefix("file://"))


def _remote(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    from shards.storage.remote import RemoteStore  # imports fsspec

    return RemoteStore(location, manifest, cache or Cache())


KINDS: dict[str, Callable[[str, Manifest, Cache | None], Store]] = {"file": _local}
"""Any other scheme is one of fsspec's."""
