"""The kinds of stores, by the scheme of a dataset's location."""

import re
from collections.abc import Callable
from pathlib import Path

from shards.storage.cache import Cache
from shards.storage.local import LocalStore
from shards.storage.store import Manifest, Store
from t5vae.common.errors import UserError

# WebDataset's users write https://host/data/train-{00000..00010}.tar
TAR_FILES = re.compile(r"\.tar(\.\w+)?$")
BRACES = re.compile(r"\{[^{}]*(\.\.|,)[^{}]*\}")

Kind = Callable[[str, Manifest, Cache | None], Store]


def _local(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    path = location.removeprefix("file://").removeprefix("local://")
    return LocalStore(path, manifest.version)


def _of_fsspec(location: str, manifest: Manifest, cache: Cache | None) -> Store:
    from shards.storage.remote import RemoteStore  # imports fsspec

    return RemoteStore(location, manifest, cache or Cache())


KINDS: dict[str, Kind] = {"file": _local, "local": _local}
ANY_OTHER: Kind = _of_fsspec


def open_store(
    location: str, manifest: Manifest | None = None, cache: Cache | None = None
) -> Store:
    """The store of a dataset.

    Args:
        location: a folder, or a URL of a scheme in `KINDS` or of a protocol that fsspec knows.
        manifest: what its files must be; without it index.json alone of a URL is kept in the cache.
        cache: where copies of a URL's files are kept; by default `Cache()`.

    Raises:
        UserError: an unknown protocol, or one whose package is not installed; names of several
            folders, or of tar files; URLs of URLs, or with a password.
    """
    braces, files = BRACES.search(location), TAR_FILES.search(location)
    if (braces or files) and not Path(location).is_dir():
        folder = BRACES.split(location)[0].rpartition("/")[0]
        raise UserError(
            f"{location} names tar files; a dataset is its folder, the one with index.json: give "
            f"{folder or 'that'}, or make one of these files: t5vae shards build"
            if files
            else f"{location} has braces, which stay as they are: give each dataset's folder or "
            "URL, several as a list"
        )
    scheme, separator, _ = location.partition("://")
    kind = KINDS.get(scheme if separator else "file", ANY_OTHER)
    return kind(location, manifest or Manifest("", {}), cache)
