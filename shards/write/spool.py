"""The spool: a corpus on disk as sorted runs, read back by ranges of keys.

An item (a text, or the bytes of its token ids) has a hash, xxh3_64 of its text, and a key, a
bijection of the hash that the seed chooses. Sorted by key, equal items meet, all are shuffled, and
a range of keys, a bucket, can be worked on apart from the others.

A run is two files: `.rows`, a ROW for each item, in the order of keys, and `.items`, the items'
bytes, one after the other. Ranges are read where they are needed, by calls that report an error: a
disk that fails under a memory map ends the process.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.read.order import key_state, splitmix64
from t5vae.common.errors import DamageError
from t5vae.common.files import written

RUN_BYTES = 64 * 2**20  # of items held in memory until they are written as a run
BUCKET_BYTES = 16 * 2**20
FEWEST_BUCKETS = 8
TYPES = {"text": pa.large_string(), "tokens": pa.large_binary()}
ROW = np.dtype([("key", "<u8"), ("hash", "<u8"), ("end", "<i8")])  # end: of the item's bytes
Span = tuple[int, int]
"""A range of keys: the first, and the one after the last."""
ALL: Span = (0, 2**64)


class Bucket(NamedTuple):
    """The items of a range of keys, sorted by key."""

    items: pa.Array
    hashes: np.ndarray  # uint64 [items]
    duplicates: int  # left out
    keys: np.ndarray  # uint64 [items]


class SpoolWriter:
    """Writes the items of one group of files as runs `GGGGG-RRRRR`.

    Args:
        folder: where the runs go.
        group: the number of the group.
        kind: "text" or "tokens".
        seed: of the keys.
        dedupe: keep one of equal items of a run. Otherwise keys come from the place of an item in
            its group, so that equal items do not end up side by side.
        span: the keys of the items to keep.

    Attributes:
        counts: "items", "bytes" and "runs" written, and "duplicates" and "others" left out.
    """

    def __init__(
        self, folder: Path, group: int, kind: str, seed: int, dedupe: bool, span: Span = ALL
    ):
        self.folder, self.group, self.kind, self.dedupe = folder, group, kind, dedupe
        self.span = span
        self.counts: Counter[str] = Counter()
        self._state = key_state(seed) if dedupe else key_state(seed, group)
        self._taken = 0
        self._begin()

    def _begin(self) -> None:
        self._items = [pa.array([], TYPES[self.kind])]
        self._hashes = [np.empty(0, np.uint64)]
        self._keys = [np.empty(0, np.uint64)]
        self._bytes = 0

    def add(self, items: Sequence[Any], texts: Sequence[str] | None = None) -> None:
        """Take items: str or, of kind "tokens", bytes, and the texts that they decode to."""
        contents = map(str.encode, items if texts is None else texts)
        digests = map(xxhash.xxh3_64_intdigest, contents)
        hashes = np.fromiter(digests, np.uint64, len(items))
        places = np.arange(self._taken, self._taken + len(items), dtype=np.uint64)
        self._taken += len(items)
        keys = splitmix64((hashes if self.dedupe else places) ^ self._state)
        if self.span != ALL:
            first, end = self.span
            mine = (keys >= np.uint64(first)) & (keys <= np.uint64(end - 1))
            self.counts["others"] += int(np.count_nonzero(~mine))
            items, hashes, keys = list(compress(items, mine)), hashes[mine], keys[mine]
        self._hashes.append(hashes)
        self._keys.append(keys)
        self._items.append(pa.array(items, TYPES[self.kind]))
        self._bytes += self._items[-1].nbytes
        if self._bytes >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was taken since the last run as another one."""
        items, hashes = pa.concat_arrays(self._items), np.concatenate(self._hashes)
        keys = np.concatenate(self._keys)
        self._begin()
        bucket = _arrange(keys, hashes, items, self.dedupe)
        with write_run(run_path(self.folder, self.group, self.counts["runs"])) as append:
            append(bucket)
        self.counts["duplicates"] += bucket.duplicates
        self.counts["items"] += len(bucket.items)
        self.counts["bytes"] += bucket.items.nbytes
        self.counts["runs"] += 1


@contextmanager
def write_run(path: Path) -> Iterator[Callable[[Bucket], None]]:
    """Write a run by and by: what is yielded takes buckets in the order of their keys."""
    with (
        written(path) as rows_path,
        written(_items_path(path)) as items_path,  # is there first
        open(rows_path, "wb") as rows_file,
        open(items_path, "wb") as items_file,
    ):

        def append(bucket: Bucket) -> None:
            rows = np.empty(len(bucket.items), ROW)
            sizes = pc.binary_length(bucket.items).to_numpy(zero_copy_only=False)
            rows["key"], rows["hash"] = bucket.keys, bucket.hashes
            rows["end"] = items_file.tell() + np.cumsum(sizes)
            rows_file.write(rows.view(np.uint8).data)
            if len(rows):
                items_file.write(_content(bucket.items))

        yield append


def _content(items: pa.Array) -> memoryview:
    """The bytes of all items, one after the other."""
    _, ends, content = items.buffers()
    ends = np.frombuffer(ends, np.int64)[items.offset :][: len(items) + 1]
    return memoryview(content)[ends[0] : ends[-1]]


def damaged(path: Path) -> DamageError:
    """What is said of a file in the folder of a build, or of a part, that is not as it was."""
    return DamageError(f"{path} is damaged: remove {path.parents[1]}, and build again what it was")


class Run(Sequence[int]):
    """A run's keys, and the items of a range of them, read from the disk when asked for.

    Raises:
        DamageError: its two files do not go together: one was cut off.
    """

    def __init__(self, path: Path, kind: str):
        self.kind = kind
        self._rows = open(path, "rb")  # noqa: SIM115
        try:
            self._items = open(_items_path(path), "rb")  # noqa: SIM115
        except OSError:
            self._rows.close()
            raise
        self.bytes = os.fstat(self._items.fileno()).st_size
        self._length, more = divmod(os.fstat(self._rows.fileno()).st_size, ROW.itemsize)
        end = int(self._read_rows(self._length - 1, self._length)["end"][0]) if self._length else 0
        if more or end != self.bytes:
            self.__exit__()
            raise damaged(path)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._items.close()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        return int(self._read_rows(place, place + 1)["key"][0])

    def find(self, key: int, start: int = 0) -> int:
        """The first place, from `start` on, with that key or a higher one."""
        return bisect_left(self, key, start)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """Keys and hashes, uint64 [stop - start], and items of a range of places."""
        before = min(start, 1)
        rows = self._read_rows(start - before, stop)
        ends = np.concatenate([np.zeros(1 - before, np.int64), rows["end"]])
        self._items.seek(ends[0])
        size = int(ends[-1] - ends[0])
        content = np.frombuffer(self._items.read(size), np.uint8, size)
        buffers = [None, pa.py_buffer(ends - ends[0]), pa.py_buffer(content)]
        rows = rows[before:]
        return (
            rows["key"],
            rows["hash"],
            pa.Array.from_buffers(TYPES[self.kind], len(rows), buffers),
        )

    def _read_rows(self, start: int, stop: int) -> np.ndarray:
        self._rows.seek(start * ROW.itemsize)
        return np.frombuffer(self._rows.read((stop - start) * ROW.itemsize), ROW, stop - start)


@dataclass(frozen=True)
class Spool:
    """All runs of a corpus.

    Attributes:
        runs: their files, in the order in which the items came.
        kind: "text" or "tokens".
        dedupe: keep one of equal items.
        items: how many the runs hold.
        buckets: how many ranges the keys are cut into.
        span: the keys that there may be.
    """

    runs: list[Path]
    kind: str
    dedupe: bool
    items: int
    buckets: int
    span: Span = ALL

    def bucket(self, number: int) -> Bucket:
        """The items of one range of keys; equal keys keep the order in which they came."""
        low, high = (bound(self.span, part, self.buckets) for part in (number, number + 1))
        found = []
        for path in self.runs:  # one is open at a time
            with Run(path, self.kind) as run:
                start = run.find(low)
                found.append(run.read(start, run.find(high, start)))
        return join_ranges(found, self.kind, self.dedupe)

    def remove(self) -> None:
        """Make room on the disk."""
        for path in self.runs:
            path.unlink(missing_ok=True)
            _items_path(path).unlink(missing_ok=True)


def open_spool(
    folder: Path, groups: Sequence[Mapping[str, int]], kind: str, dedupe: bool, span: Span = ALL
) -> Spool:
    """The spool in a folder, from the counts of each group's writer."""
    runs = [
        run_path(folder, group, run)
        for group, counts in enumerate(groups)
        for run in range(counts["runs"])
    ]
    items, size = (sum(counts[what] for counts in groups) for what in ("items", "bytes"))
    return Spool(runs, kind, dedupe, items, max(FEWEST_BUCKETS, -(-size // BUCKET_BYTES)), span)


def run_path(folder: Path, group: int, run: int) -> Path:
    """The file of a run's rows, which appears once the run is whole."""
    return folder / f"{group:05}-{run:05}.rows"


def _items_path(path: Path) -> Path:
    return path.with_suffix(".items")


def bound(span: Span, number: int, ranges: int) -> int:
    """The first key of one of so many equal ranges of a span."""
    return span[0] + (span[1] - span[0]) * number // ranges


def join_ranges(
    found: Iterable[tuple[np.ndarray, np.ndarray, pa.Array]], kind: str, dedupe: bool
) -> Bucket:
    """What several runs have of a range of keys, in the order of the runs, as one bucket."""
    nothing = np.empty(0, np.uint64), np.empty(0, np.uint64), pa.array([], TYPES[kind])
    keys, hashes, items = zip(nothing, *found, strict=True)
    return _arrange(np.concatenate(keys), np.concatenate(hashes), pa.concat_arrays(items), dedupe)


def _arrange(keys: np.ndarray, hashes: np.ndarray, items: pa.Array, dedupe: bool) -> Bucket:
    """Sort by key, ties as they come, and keep the first of equal items if asked."""
    order = np.argsort(keys, kind="stable")
    if dedupe:
        order = order[_first_of_equal(keys[order], items, order)]
    return Bucket(items.take(pa.array(order)), hashes[order], len(keys) - len(order), keys[order])


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
