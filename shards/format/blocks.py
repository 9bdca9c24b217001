"""Blocks: their table, and reading them: bytes at known offsets of a shard, checked."""

import io
import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from shards.storage.store import Store, unreadable
from t5vae.common.errors import DamageError
from t5vae.common.storage import patiently

BLOCK = np.dtype(
    [
        ("shard", "<i4"),  # place in Index.shards
        ("lengths_offset", "<i8"),  # bytes from the shard's start to the array's data
        ("tokens_offset", "<i8"),
        ("sequences", "<i4"),
        ("tokens", "<i8"),
        ("crc32", "<u4"),  # of the lengths' bytes, then the tokens'
    ]
)
CHUNKS = 16  # rows of a full block are a multiple of it
MOST_TOKENS = 2**26  # of a block
SLACK = 2**16  # bytes between the arrays of a shard, and after the last, at most: tar's headers


def read_table(content: bytes) -> np.ndarray:
    """BLOCK [blocks] of a blocks.npy; nothing is allocated or unpickled.

    Raises:
        ValueError: it is none.
    """
    file = io.BytesIO(content)
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy's header parser raises half a dozen kinds
        raise ValueError(str(error)) from None
    size = len(content) - file.tell()
    if dtype != BLOCK or shape != (size // BLOCK.itemsize,) or size % BLOCK.itemsize:
        raise ValueError("no table of blocks")
    return np.frombuffer(content, BLOCK, offset=file.tell())


def fit(
    table: np.ndarray, sizes: Sequence[int], block_size: int, max_length: int, dtype: str
) -> bool:
    """Whether blocks lie one after the other in their shards, no larger than they can be.

    Args:
        table: BLOCK [blocks].
        sizes: bytes of each shard.
        block_size, max_length, dtype: of the index.
    """
    names = ("shard", "sequences", "tokens", "lengths_offset", "tokens_offset")
    shard, rows, tokens, begin, gap = (table[name].astype(np.int64) for name in names)
    if not len(table) or shard[0] < 0 or shard[-1] >= len(sizes) or (np.diff(shard) < 0).any():
        return False
    bytes_of = np.array(sizes, np.int64)[shard]
    if not all(
        bool(np.all(limit))
        for limit in (
            (rows >= 1) & (rows <= block_size) & (tokens <= MOST_TOKENS),
            (rows <= tokens) & (tokens <= rows * max_length),
            (begin >= 0) & (begin <= gap) & (gap <= bytes_of),
        )
    ):
        return False
    end = gap + tokens * np.dtype(dtype).itemsize
    first = np.flatnonzero(np.diff(shard, prepend=-1))
    before = begin - np.roll(end, 1)
    before[first] = begin[first]
    between = gap - begin - 2 * rows
    after = (bytes_of - end)[[*(first[1:] - 1), len(table) - 1]]
    return all(bool(np.all((free >= 0) & (free <= SLACK))) for free in (between, before, after))


def wrong_with(lengths: np.ndarray, tokens: np.ndarray, max_length: int, vocab_size: int) -> str:
    """What is wrong with a block's arrays, if anything: a stranger's have a checksum too."""
    if lengths.min() < 1 or lengths.sum(dtype=np.int64) != len(tokens):
        return "has lengths that do not add up to its tokens"
    if lengths.max() > max_length or tokens.max() >= vocab_size:
        return "has sequences or token ids beyond the index's limits"
    return ""


class BlockReader:
    """Reads blocks, each checked against its crc32.

    Args:
        store: the dataset's files.
        path: the dataset, for people.
        shards: the names of all its shards.
        table: BLOCK [blocks], those to read; numbers count through them.
        dtype: of the tokens: "uint16" or "uint32".
        max_length: the most tokens of a sequence.
        vocab_size: ids are below it.

    Attributes:
        first: int64 [blocks], the number of each block's first sequence.
    """

    def __init__(
        self,
        store: Store,
        path: str,
        shards: Sequence[str],
        table: np.ndarray,
        dtype: str,
        max_length: int,
        vocab_size: int,
    ):
        self.store, self.path, self.shards, self.table = store, path, shards, table
        self.max_length, self.vocab_size = max_length, vocab_size
        self.dtype = np.dtype(dtype)
        rows = table["sequences"].astype(np.int64)
        self.first = np.cumsum(rows) - rows
        self._of_shard = np.searchsorted(table["shard"], np.arange(len(shards)))

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One block: lengths uint16 [rows], tokens uint16 or uint32 [their sum].

        Raises:
            DamageError: its bytes are missing or not those that were written.
            StorageError: the storage failed for minutes.
            UserError: it may not be read.
        """
        where = self.where(number)
        try:
            return patiently(partial(self.try_read, number), where)
        except OSError as error:
            raise unreadable(where, error) from None

    def try_read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The same in one try.

        Raises:
            DamageError: its bytes are missing or not those that were written.
            OSError: it cannot be read, or not now.
        """
        try:
            return self._read(number)
        except DamageError:
            shard = self.shards[self.table[number]["shard"]]
            if self.store.forget(shard):  # this machine's copy was damaged
                return self._read(number)
            raise

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        entry = self.table[number]
        begin, gap = int(entry["lengths_offset"]), int(entry["tokens_offset"])
        dtype = self.dtype.newbyteorder("<")
        size = gap + int(entry["tokens"]) * dtype.itemsize - begin
        try:
            content = self.store.read(self.shards[entry["shard"]], begin, size)
        except FileNotFoundError as error:
            raise DamageError(f"{self.where(number)}: {error.strerror}") from None
        if len(content) < size:
            raise DamageError(f"{self.where(number)} is cut off (the shard is too short)")
        lengths = np.frombuffer(content, "<u2", int(entry["sequences"]))
        tokens = np.frombuffer(content, dtype, int(entry["tokens"]), gap - begin)
        if zlib.crc32(tokens.data, zlib.crc32(lengths.data)) != int(entry["crc32"]):
            raise DamageError(f"{self.where(number)} is damaged (its checksum differs)")
        if problem := wrong_with(lengths, tokens, self.max_length, self.vocab_size):
            raise DamageError(f"{self.where(number)} {problem}")
        return lengths, tokens

    def sequences(
        self, numbers: np.ndarray, max_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sequences by number.

        Args:
            numbers: int64 [n], each of a sequence in the table's blocks.
            max_length: the most tokens one may have.
            pad_id: what fills the shorter ones up.

        Returns:
            ids int64 [n, longest], padded, and lengths int64 [n].

        Raises:
            DamageError, StorageError, UserError: as `read` does.
        """
        block = np.searchsorted(self.first, numbers, side="right") - 1
        lengths = np.empty(len(numbers), np.int64)
        ids = np.full((len(numbers), max_length), pad_id, np.int64)
        for number in np.unique(block).tolist():
            its_lengths, tokens = self.read(number)
            starts = np.cumsum(its_lengths, dtype=np.int64) - its_lengths
            mine = np.flatnonzero(block == number)
            rows = numbers[mine] - self.first[number]
            lengths[mine] = its_lengths[rows]
            column = np.arange(lengths[mine].max())
            inside = column < lengths[mine, None]
            at = np.where(inside, starts[rows, None] + column, 0)
            ids[mine, : len(column)] = np.where(inside, tokens[at], pad_id)
        return ids[:, : lengths.max(initial=0)], lengths

    def where(self, number: int) -> str:
        """Name a block for people: its shard, and its place within it."""
        shard = int(self.table[number]["shard"])
        return f"{self.path}/{self.shards[shard]}, block {number - self._of_shard[shard]}"
