"""The spool: a corpus on disk as sorted runs, read back by ranges of keys.

An item (a text, or the bytes of its token ids) has a hash, xxh3_64 of its text, and a key, a
bijection of the hash that the seed chooses. Sorted by key, equal items meet, all are shuffled, and
a range of keys, a bucket, can be worked on apart from the others.

A run is an Arrow file of one record batch with the columns key and hash, uint64, and item.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.read.order import key_state, splitmix64
from t5vae.common.files import written

RUN_BYTES = 64 * 2**20  # of items held in memory until they are written as a run
BUCKET_BYTES = 16 * 2**20
FEWEST_BUCKETS = 8
TYPES = {"text": pa.large_string(), "tokens": pa.large_binary()}


class Bucket(NamedTuple):
    """The items of a range of keys, sorted by key."""

    items: pa.Array
    hashes: np.ndarray  # uint64 [items]
    duplicates: int  # left out


class SpoolWriter:
    """Writes the items of one group of files as runs `GGGGG-RRRRR.arrow`.

    Args:
        folder: where the runs go.
        group: the number of the group.
        kind: "text" or "tokens".
        seed: of the keys.
        dedupe: keep one of equal items of a run. Otherwise keys come from the place of an item in
            its group, so that equal items do not end up side by side.

    Attributes:
        counts: "items", "bytes" and "runs" written, and "duplicates" left out.
    """

    def __init__(self, folder: Path, group: int, kind: str, seed: int, dedupe: bool):
        self.folder, self.group, self.kind, self.dedupe = folder, group, kind, dedupe
        self.counts: Counter[str] = Counter()
        self._state = key_state(seed) if dedupe else key_state(seed, group)
        self._begin()

    def _begin(self) -> None:
        self._items = [pa.array([], TYPES[self.kind])]
        self._hashes = [np.empty(0, np.uint64)]
        self._bytes = 0

    def add(self, items: Sequence[Any], texts: Sequence[str] | None = None) -> None:
        """Take items: str or, of kind "tokens", bytes, and the texts that they decode to."""
        contents = map(str.encode, items if texts is None else texts)
        digests = map(xxhash.xxh3_64_intdigest, contents)
        self._hashes.append(np.fromiter(digests, np.uint64, len(items)))
        self._items.append(pa.array(items, TYPES[self.kind]))
        self._bytes += self._items[-1].nbytes
        if self._bytes >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was taken since the last run as another one."""
        items, hashes = pa.concat_arrays(self._items), np.concatenate(self._hashes)
        self._begin()
        first = self.counts["items"] + self.counts["duplicates"]
        places = np.arange(first, first + len(hashes), dtype=np.uint64)
        keys = splitmix64((hashes if self.dedupe else places) ^ self._state)
        keys, hashes, items = _arrange(keys, hashes, items, self.dedupe)
        run = pa.record_batch({"key": keys, "hash": hashes, "item": items})
        with (
            written(run_path(self.folder, self.group, self.counts["runs"])) as path,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, run.schema) as writer,
        ):
            writer.write_batch(run)
        self.counts["duplicates"] += len(places) - len(items)
        self.counts["items"] += len(items)
        self.counts["bytes"] += items.nbytes
        self.counts["runs"] += 1


@dataclass(frozen=True)
class Spool:
    """All runs of a corpus.

    Attributes:
        runs: their files, in the order in which the items came.
        kind: "text" or "tokens".
        dedupe: keep one of equal items.
        items: how many the runs hold.
        buckets: how many ranges the keys are cut into.
    """

    runs: list[Path]
    kind: str
    dedupe: bool
    items: int
    buckets: int

    def bucket(self, number: int) -> Bucket:
        """The items of one range of keys; equal keys keep the order in which they came."""
        keys, hashes = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        items = [pa.array([], TYPES[self.kind])]
        for path in self.runs:
            with pa.memory_map(str(path)) as file:
                run = pa.ipc.open_file(file).get_batch(0)
                mine = _range(run["key"].to_numpy(), number, self.buckets)
                keys.append(run["key"].to_numpy()[mine].copy())
                hashes.append(run["hash"].to_numpy()[mine].copy())
                items.append(pa.concat_arrays([run["item"][mine]]))  # a copy too: maps are closed
        found = sum(map(len, keys))
        _, kept, arranged = _arrange(
            np.concatenate(keys), np.concatenate(hashes), pa.concat_arrays(items), self.dedupe
        )
        return Bucket(arranged, kept, found - len(kept))

    def remove(self) -> None:
        """Make room on the disk."""
        for path in self.runs:
            path.unlink(missing_ok=True)


def open_spool(folder: Path, groups: Sequence[Mapping[str, int]], kind: str, dedupe: bool) -> Spool:
    """The spool in a folder, from the counts of each group's writer."""
    runs = [
        run_path(folder, group, run)
        for group, counts in enumerate(groups)
        for run in range(counts["runs"])
    ]
    items, size = (sum(counts[what] for counts in groups) for what in ("items", "bytes"))
    return Spool(runs, kind, dedupe, items, max(FEWEST_BUCKETS, -(-size // BUCKET_BYTES)))


def run_path(folder: Path, group: int, run: int) -> Path:
    """The file of a run."""
    return folder / f"{group:05}-{run:05}.arrow"


def _range(keys: np.ndarray, bucket: int, buckets: int) -> slice:
    """Where a bucket lies in sorted uint64 [n] keys."""
    lowest = np.uint64(2**64 * bucket // buckets)
    highest = np.uint64(2**64 * (bucket + 1) // buckets - 1)
    return slice(
        int(np.searchsorted(keys, lowest)), int(np.searchsorted(keys, highest, side="right"))
    )


def _arrange(
    keys: np.ndarray, hashes: np.ndarray, items: pa.Array, dedupe: bool
) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Sort by key, ties as they come, and keep the first of equal items if asked."""
    order = np.argsort(keys, kind="stable")
    if dedupe:
        order = order[_first_of_equal(keys[order], items, order)]
    return keys[order], hashes[order], items.take(pa.array(order))


def _first_of_equal(keys: np.ndarray, items: pa.Array, order: np.ndarray) -> np.ndarray:
    """Which of items[order], sorted by keys, equals none before it: bool [n]."""
    first = np.ones(len(keys), bool)
    twins = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    pairs = items.take(pa.array(order[twins])), items.take(pa.array(order[twins - 1]))
    equal = pc.equal(*pairs).to_numpy(zero_copy_only=False)
    first[twins] = ~equal
    if not equal.all():  # different items of one hash
        seen = set()
        for place in np.flatnonzero(np.isin(keys, keys[twins[~equal]])).tolist():
            item = (keys[place], items[order[place]].as_py())
            first[place] = item not in seen
            seen.add(item)
    return first
