"""A checkpoint's files compared with their hashes by all ranks together, each a part of them."""

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from t5vae.checkpoint.files import ABSENT, reach
from t5vae.checkpoint.opened import OpenFiles
from t5vae.cluster.agreement import gather_objects, raise_together
from t5vae.common.errors import StorageError, UserError

CHUNK = 2**25  # bytes that are read at once, and hashed
SECONDS = 1.0  # after which ranks meet, however much they have left


def verify_together(checkpoint: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, or None; all ranks call it, each hashes its part.

    Ranks meet now and then, so that they wait for one that has more to hash for as long as it takes
    it, and in vain for one that hangs no longer than ever.

    Args:
        files: bytes and sha256 by name, as a manifest has them.

    Raises:
        SharedStorageError: the storage failed some rank for minutes.
        SharedError: some rank may not read a file.
    """
    names = own_files(files, dist.get_rank(), dist.get_world_size())
    work = changed_files(checkpoint, {name: files[name] for name in names})
    problem: str | None = None
    error: UserError | StorageError | None = None
    some_left, some_bad = True, False
    while some_left and not some_bad:
        left = False
        try:
            problem, left = _go_on(work)
        except (UserError, StorageError) as found:
            error = found
        reports = gather_objects((left, bool(problem or error)))
        some_left, some_bad = (any(told) for told in zip(*reports, strict=True))
    if not some_bad:
        return None
    raise_together(error)
    return next(filter(None, gather_objects(problem)), None)


def own_files(files: Iterable[str], rank: int, world: int) -> list[str]:
    """Those that a rank hashes: the one that it wrote, where as many ranks did."""
    return sorted(files)[rank::world]


def _go_on(work: Iterator[str | None]) -> tuple[str | None, bool]:
    """Work for a while; what is wrong, if that was found, and whether there may be more to do."""
    end = time.monotonic() + SECONDS
    for problem in work:
        if problem or time.monotonic() > end:
            return problem, not problem
    return None, False


def changed_files(checkpoint: Path, files: dict[str, Any]) -> Iterator[str | None]:
    """Hash files, as far as the next chunk each time.

    Yields:
        What is wrong with one, or None.
    """
    largest = max((of["bytes"] for of in files.values()), default=0)
    content = memoryview(bytearray(min(CHUNK, largest)))
    for name, wanted in files.items():
        path, digest = checkpoint / name, hashlib.sha256()
        try:
            size = reach(path, path.stat).st_size
            if size != wanted["bytes"]:
                yield f"{name} has {size} bytes, not {wanted['bytes']}"
                continue
            with OpenFiles() as opened:
                for at in range(0, size, CHUNK):
                    chunk = content[: min(CHUNK, size - at)]
                    opened.fill(path, at, chunk)
                    digest.update(chunk)
                    yield None
        except ABSENT:
            yield f"{name} is missing"
        else:
            yield None if digest.hexdigest() == wanted["sha256"] else f"{name} has changed"
