"""The stages of a build that are cut into tasks: read, cut what is too long, tokenize.

Where a tokenizer may take texts for equal, they are encoded before, and meet by their ids.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress, groupby, islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.write.corpora import BAD_ROW, BadRowError, File, Reading
from shards.write.formats.format import Format
from shards.write.spool import ALL, FEWEST_BUCKETS, Span, Spool, SpoolWriter
from shards.write.workers import Counts, Job
from t5vae.common.errors import UserError
from t5vae.common.files import written
from t5vae.common.progress import Advance

if TYPE_CHECKING:
    from shards.write.encoders import Encoder, TextEncoder, TokenEncoder

BATCH_BYTES = 2**19  # of items encoded at once
# Reasons to drop.
EQUAL, EQUAL_PIECES, EQUAL_IDS = "duplicate", "duplicate once cut", "duplicate once tokenized"
TOO_LONG = "too long"
BAD_ROWS = 1000  # that a task names
EIGHTH = 61  # bits of a key below those that say in which eighth of all keys it lies
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
    bad_rows: str
    seed: int
    dedupe: bool
    token_encoder: "TokenEncoder | None"
    """Of items of kind "tokens": so that equal sequences meet, however they end."""
    span: Span = ALL
    """The keys of the items to keep."""

    @property
    def tasks(self) -> int:
        return len(self.groups)

    @property
    def total(self) -> int:
        return sum(file.bytes for group in self.groups for file in group)

    def __call__(self, task: int, advance: Advance) -> Counts:
        reading = Reading(self.groups[task], self.format, self.column, self.bad_rows)
        kind = self.format.kind(self.column)
        writer = SpoolWriter(self.folder, task, kind, self.seed, self.dedupe, self.span)
        before = 0
        try:
            for items in reading:
                self._add(writer, items)
                advance(reading.bytes_read - before)
                before = reading.bytes_read
        except BadRowError as error:
            raise UserError(f"{error}; --bad-rows skip leaves such rows out") from None
        writer.flush()
        advance(reading.bytes_read - before)
        dropped = reading.skipped + Counter({EQUAL: writer.counts["duplicates"]})
        return {
            "spool": writer.counts,
            "texts": writer.counts["items"]
            + writer.counts["others"]
            + sum(dropped[reason] for reason in (EQUAL, "empty", BAD_ROW)),
            "dropped": dropped,
            "bad_rows": reading.bad_rows[:BAD_ROWS],
            "digests": reading.digests,
        }

    def _add(self, writer: SpoolWriter, items: list[Any]) -> None:
        if self.token_encoder is None:
            writer.add(items)
        else:
            items = self.token_encoder.plain(items)
            writer.add(items, self.token_encoder.decode(*self.token_encoder.encode(items)))


@dataclass(frozen=True)
class _SpoolAgain(Job):
    """A stage that makes another spool of one; a task is a few buckets."""

    spool: Spool
    encoder: Any
    max_length: int
    seed: int

    @property
    def tasks(self) -> int:
        return max(FEWEST_BUCKETS, self.spool.buckets // BUCKETS_AT_ONCE)

    @property
    def total(self) -> int:
        return self.spool.items

    def _buckets(self, task: int) -> range:
        first, end = (self.spool.buckets * part // self.tasks for part in (task, task + 1))
        return range(first, end)


@dataclass(frozen=True)
class Cut(_SpoolAgain):
    """Spool the corpus again with pieces in place of what is too long.

    A piece has a key of its own, so that equal ones meet.
    """

    title = "cut what is too long"

    encoder: "Encoder"
    keep: int | None
    """How many pieces of an item are kept: 1, or None for all."""

    def __call__(self, task: int, advance: Advance) -> Counts:
        encoding = _Encoding(self.spool, self.encoder, self.max_length, advance)
        writer = SpoolWriter(self.folder, task, self.spool.kind, self.seed, self.spool.dedupe)
        for bucket in self._buckets(task):
            for items, _, _, lengths, longer, _ in encoding.batches(bucket):
                fits = lengths <= self.max_length
                cuts = (
                    islice(self.encoder.cut(item, self.max_length), self.keep)
                    for item in (*compress(items, ~fits), *longer)
                )
                self._add(writer, [*compress(items, fits), *chain.from_iterable(cuts)])
        writer.flush()
        encoding.dropped[EQUAL_PIECES] = writer.counts["duplicates"]
        return encoding.counts() | {"spool": writer.counts}

    def _add(self, writer: SpoolWriter, items: list[Any]) -> None:
        is_text = self.spool.kind == "text"
        writer.add(items, None if is_text else self.encoder.decode(*self.encoder.encode(items)))


@dataclass(frozen=True)
class Encode(_SpoolAgain):
    """Spool the corpus again as token ids.

    Keys come from the texts that the ids decode to: what a tokenizer takes for equal meets, and
    falls to one split.
    """

    title = "encoded the corpus"

    encoder: "TextEncoder"
    equal: str
    """The reason to note for texts that equal another."""

    def __call__(self, task: int, advance: Advance) -> Counts:
        encoding = _Encoding(self.spool, self.encoder, self.max_length, advance, self.equal)
        writer = SpoolWriter(self.folder, task, "tokens", self.seed, self.spool.dedupe)
        encoded = altered = 0
        lost: dict[int, Counter[str]] = defaultdict(Counter)
        for bucket in self._buckets(task):
            for texts, _, tokens, lengths, _, keys in encoding.batches(bucket):
                back = self.encoder.decode(tokens, lengths)
                differ = [text != it for text, it in zip(texts, back, strict=True)]
                encoded, altered = encoded + len(texts), altered + sum(differ)
                for key, given, returned in compress(zip(keys, texts, back, strict=True), differ):
                    lost[int(key) >> EIGHTH].update(Counter(given) - Counter(returned))
                ends = lengths.cumsum()
                rows = [
                    tokens[end - n : end - 1].tobytes()
                    for end, n in zip(ends, lengths, strict=True)
                ]
                fits = lengths <= self.max_length
                writer.add(list(compress(rows, fits)), list(compress(back, fits)))
        writer.flush()
        encoding.dropped[EQUAL_IDS] = writer.counts["duplicates"]
        encoding.dropped[TOO_LONG] = encoding.overlong
        return encoding.counts() | {
            "spool": writer.counts,
            "encoded": encoded,
            "altered": altered,
            "lost": lost,
        }


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
        for _, hashes, tokens, lengths, _, _ in encoding.batches(task):
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
        encoding.dropped[TOO_LONG] = encoding.overlong
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
    longer: list[Any]  # items so long that they were not encoded
    keys: np.ndarray  # uint64 [items]


class _Encoding:
    """Encodes buckets, and counts what it sees."""

    def __init__(
        self,
        spool: Spool,
        encoder: "Encoder",
        max_length: int,
        advance: Advance,
        equal: str = EQUAL,
    ):
        self.spool, self.encoder, self.max_length = spool, encoder, max_length
        self.advance, self.equal = advance, equal
        self.dropped: Counter[str] = Counter()
        self.lengths = np.zeros(LONGEST_COUNTED + 1, np.int64)
        self.overlong = 0

    def batches(self, bucket: int) -> Iterator[_Batch]:
        """The usable items of a bucket, in the order of their keys."""
        items, hashes, duplicates, keys = self.spool.bucket(bucket)
        self.dropped[self.equal] += duplicates
        self.advance(duplicates)
        most = self.encoder.most(self.max_length)
        for start, stop in pairwise(_batch_bounds(items)):
            batch = items[start:stop].to_pylist()
            usable = self.encoder.usable(batch)
            self.dropped["special token"] += int(np.count_nonzero(~usable))
            longer = [item for item in compress(batch, usable) if len(item) > most]
            chosen = usable & np.fromiter((len(item) <= most for item in batch), bool, len(batch))
            kept = list(compress(batch, chosen))
            tokens, lengths = self.encoder.encode(kept)
            clipped = np.minimum(lengths, LONGEST_COUNTED)
            self.lengths += np.bincount(clipped, minlength=LONGEST_COUNTED + 1)
            self.lengths[LONGEST_COUNTED] += len(longer)
            self.overlong += int(np.count_nonzero(lengths > self.max_length)) + len(longer)
            its_hashes, its_keys = (column[start:stop][chosen] for column in (hashes, keys))
            yield _Batch(kept, its_hashes, tokens, lengths, longer, its_keys)
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
