"""The stages of a build that are cut into tasks: read, cut what is too long, tokenize."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.write.corpora import File, Reading
from shards.write.formats.format import Format
from shards.write.spool import FEWEST_BUCKETS, Spool, SpoolWriter
from shards.write.workers import Counts, Job
from t5vae.common.files import written
from t5vae.common.progress import Advance

if TYPE_CHECKING:
    from shards.format.tokenizers import Encoder, TokenEncoder

BATCH_BYTES = 2**19  # of items encoded at once
EQUAL_PIECES = "duplicate once cut"  # a reason to drop
LONGEST_COUNTED = 1024  # the last entry of Index.unique_lengths: this length or more
LEAST_GROUP, MOST_GROUP = 2**20, 256 * 2**20  # bytes of files that one task reads
GROUPS = 64  # of a corpus between the two
BUCKETS_AT_ONCE = 4  # in a large corpus, make one run of pieces


@dataclass(frozen=True)
class Read(Job):
    """Spool the corpus; a task is a group of files."""

    title = "read the corpus"
    unit = "bytes"

    groups: list[list[File]]
    format: Format
    column: str | None
    seed: int
    dedupe: bool
    token_encoder: "TokenEncoder | None"
    """Of items of kind "tokens": so that equal sequences meet, however they end."""

    @property
    def tasks(self) -> int:
        return len(self.groups)

    @property
    def total(self) -> int:
        return sum(file.bytes for group in self.groups for file in group)

    def __call__(self, task: int, advance: Advance) -> Counts:
        reading = Reading(self.groups[task], self.format, self.column)
        kind = self.format.kind(self.column)
        writer = SpoolWriter(self.folder, task, kind, self.seed, self.dedupe)
        before = 0
        for items in reading:
            writer.add(self.token_encoder.plain(items) if self.token_encoder else items)
            advance(reading.bytes_read - before)
            before = reading.bytes_read
        writer.flush()
        advance(reading.bytes_read - before)
        dropped = reading.skipped + Counter(duplicate=writer.counts["duplicates"])
        return {
            "spool": writer.counts,
            "texts": writer.counts["items"] + dropped["duplicate"] + dropped["empty"],
            "dropped": dropped,
            "digests": reading.digests,
        }


@dataclass(frozen=True)
class Cut(Job):
    """Spool the corpus again with pieces in place of what is too long; a task is a few buckets.

    A piece has a key of its own, so that equal ones meet.
    """

    title = "cut what is too long"

    spool: Spool
    encoder: "Encoder"
    max_length: int
    seed: int
    keep: int | None
    """How many pieces of an item are kept: 1, or None for all."""

    @property
    def tasks(self) -> int:
        return max(FEWEST_BUCKETS, self.spool.buckets // BUCKETS_AT_ONCE)

    @property
    def total(self) -> int:
        return self.spool.items

    def __call__(self, task: int, advance: Advance) -> Counts:
        encoding = _Encoding(self.spool, self.encoder, self.max_length, advance)
        writer = SpoolWriter(self.folder, task, self.spool.kind, self.seed, self.spool.dedupe)
        first, end = (self.spool.buckets * part // self.tasks for part in (task, task + 1))
        for bucket in range(first, end):
            for items, _, _, lengths in encoding.batches(bucket):
                fits = lengths <= self.max_length
                cuts = (self.encoder.cut(item, self.max_length) for item in compress(items, ~fits))
                pieces = [piece for cut in cuts for piece in cut[: self.keep]]
                writer.add([*compress(items, fits), *pieces])
        writer.flush()
        encoding.dropped[EQUAL_PIECES] = writer.counts["duplicates"]
        return encoding.counts() | {"spool": writer.counts}


@dataclass(frozen=True)
class Tokenize(Job):
    """Turn items into sequences; a task is a bucket.

    `NNNNN.npz` holds for each split {split}_lengths, uint16 [sequences], and {split}_tokens, uint16
    or uint32 [sum of lengths], in the order of the keys.
    """

    title = "tokenized the corpus"

    spool: Spool
    encoder: "Encoder"
    max_length: int
    valid_fraction: float
    dtype: str
    equal: str
    """The reason to note for items that equal another."""

    @property
    def tasks(self) -> int:
        return self.spool.buckets

    @property
    def total(self) -> int:
        return self.spool.items

    def __call__(self, task: int, advance: Advance) -> Counts:
        encoding = _Encoding(self.spool, self.encoder, self.max_length, advance, self.equal)
        sequences: Counter[str] = Counter()
        kept_tokens = 0
        arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        for _, hashes, tokens, lengths in encoding.batches(task):
            valid = in_valid(hashes, self.valid_fraction)
            fits = lengths <= self.max_length
            kept_tokens += int(lengths[fits].sum())
            for split, mine in (("train", fits & ~valid), ("valid", fits & valid)):
                sequences[split] += int(np.count_nonzero(mine))
                arrays[f"{split}_lengths"].append(lengths[mine].astype("<u2"))
                arrays[f"{split}_tokens"].append(
                    tokens[np.repeat(mine, lengths)].astype(self.dtype)
                )
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        with written(self.folder / f"{task:05}.npz") as path, open(path, "wb") as file:
            np.savez(file, **joined)  # type: ignore[arg-type]
        encoding.dropped["too long"] = encoding.overlong
        return encoding.counts() | {"sequences": sequences, "tokens": kept_tokens}


def group_files(files: Sequence[File]) -> list[list[File]]:
    """Cut a corpus's files into groups of neighbours with about equally many bytes."""
    sizes = np.array([file.bytes or MOST_GROUP for file in files])
    group = np.clip(sizes.sum() // GROUPS, LEAST_GROUP, MOST_GROUP)
    numbers = iter(((np.cumsum(sizes) - sizes) // group).tolist())
    return [list(neighbours) for _, neighbours in groupby(files, lambda _: next(numbers))]


def in_valid(hashes: np.ndarray, valid_fraction: float) -> np.ndarray:
    """Which items are in the split "valid": it depends on the item alone. bool [n]."""
    return hashes < np.uint64(valid_fraction * 2**64)


class _Batch(NamedTuple):
    items: list[Any]
    hashes: np.ndarray  # uint64 [items]
    tokens: np.ndarray  # int32 [sum of lengths]
    lengths: np.ndarray  # int64 [items]


class _Encoding:
    """Encodes buckets, and counts what it sees."""

    def __init__(
        self,
        spool: Spool,
        encoder: "Encoder",
        max_length: int,
        advance: Advance,
        equal: str = "duplicate",
    ):
        self.spool, self.encoder, self.max_length = spool, encoder, max_length
        self.advance, self.equal = advance, equal
        self.dropped: Counter[str] = Counter()
        self.lengths = np.zeros(LONGEST_COUNTED + 1, np.int64)
        self.overlong = 0

    def batches(self, bucket: int) -> Iterator[_Batch]:
        """The usable items of a bucket, in the order of their keys."""
        items, hashes, duplicates = self.spool.bucket(bucket)
        self.dropped[self.equal] += duplicates
        self.advance(duplicates)
        for start, stop in pairwise(_batch_bounds(items)):
            batch = items[start:stop].to_pylist()
            usable = self.encoder.usable(batch)
            self.dropped["special token"] += int(np.count_nonzero(~usable))
            chosen = list(compress(batch, usable))
            tokens, lengths = self.encoder.encode(chosen)
            clipped = np.minimum(lengths, LONGEST_COUNTED)
            self.lengths += np.bincount(clipped, minlength=LONGEST_COUNTED + 1)
            self.overlong += int(np.count_nonzero(lengths > self.max_length))
            yield _Batch(chosen, hashes[start:stop][usable], tokens, lengths)
            self.advance(len(batch))

    def counts(self) -> Counts:
        return {
            "dropped": self.dropped,
            "lengths": self.lengths.tolist(),
            "overlong": self.overlong,
        }


def _batch_bounds(items: pa.Array) -> list[int]:
    ends = np.cumsum(pc.binary_length(items))
    steps = np.arange(0, items.nbytes, BATCH_BYTES)
    return np.unique([*np.searchsorted(ends, steps, side="right"), len(items)]).tolist()
