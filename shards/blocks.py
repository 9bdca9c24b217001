"""Reading blocks: bytes at known offsets of a shard, checked and kept.

Shapes: n sequences, T the longest of them.
"""

import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards.errors import DamageError
from shards.index import Index


class Block(NamedTuple):
    """The sequences of one block; sequence i is tokens[starts[i] : starts[i] + lengths[i]]."""

    lengths: np.ndarray  # int64 [rows]
    starts: np.ndarray  # int64 [rows]
    tokens: np.ndarray  # uint16 or uint32 [sum of lengths]
    weight: float  # 0 for a damaged block's stand-in


class BlockReader:
    """Reads the blocks of one split, each checked against its crc32 when it is read.

    The blocks used last are kept in memory: at most `keep` of them, each of 16 bytes a sequence
    and 2 or 4 bytes a token (320 blocks of 4,096 sequences of 12 tokens: 50 MB).

    Args:
        index: the dataset.
        split: the split's name.
        keep: how many blocks to hold.
        stand_in: whether a damaged block is replaced by rows of one end token and weight 0
            instead of raising.

    Attributes:
        table: BLOCK [blocks], the split's blocks.
        first: int64 [blocks], the number of each block's first sequence.
        damaged: the blocks that were replaced, and why.
    """

    def __init__(self, index: Index, split: str, keep: int = 8, stand_in: bool = False):
        self.index = index
        self.table = index.split_blocks(split)
        rows = self.table["sequences"].astype(np.int64)
        self.first = np.cumsum(rows) - rows
        self.keep = keep
        self.stand_in = stand_in
        self.damaged: dict[int, str] = {}
        self._kept: OrderedDict[int, Block] = OrderedDict()
        self._files: dict[int, BinaryIO] = {}

    def block(self, number: int) -> Block:
        """One block of the split.

        Raises:
            DamageError: its bytes are missing or not those that were written.
        """
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        try:
            block = self._load(number)
        except DamageError as error:
            if not self.stand_in:
                raise
            self.damaged[number] = str(error)
            rows = int(self.table[number]["sequences"])
            one_end = np.full(1, self.index.eos_id, self.index.dtype)
            block = Block(np.ones(rows, np.int64), np.zeros(rows, np.int64), one_end, 0.0)
        self._kept[number] = block
        if len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return block

    def lengths(self, blocks: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The lengths of sequences at int64 [n] blocks and rows: int64 [n]."""
        lengths = np.empty(len(blocks), np.int64)
        for number in np.unique(blocks).tolist():
            mine = blocks == number
            lengths[mine] = self.block(number).lengths[rows[mine]]
        return lengths

    def gather(
        self, blocks: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sequences at int64 [n] blocks and rows.

        Returns:
            ids: int64 [n, T], padded with the index's pad_id.
            lengths: int64 [n].
            weights: float32 [n], 0 for stand-ins and 1 otherwise.
        """
        lengths = self.lengths(blocks, rows)
        columns = np.arange(lengths.max(initial=0))
        ids = np.empty((len(blocks), len(columns)), np.int64)
        weights = np.empty(len(blocks), np.float32)
        for number in np.unique(blocks).tolist():
            mine = np.flatnonzero(blocks == number)
            block = self.block(number)
            at = block.starts[rows[mine], None] + columns
            ids[mine] = block.tokens.take(at, mode="clip")  # past a row's end: replaced below
            weights[mine] = block.weight
        ids[columns >= lengths[:, None]] = self.index.pad_id
        return ids, lengths, weights

    def _load(self, number: int) -> Block:
        entry = self.table[number]
        shard = int(entry["shard"])
        rows, size = int(entry["sequences"]), int(entry["tokens"])
        dtype = np.dtype(self.index.dtype)
        lengths = self._bytes(number, shard, int(entry["lengths_offset"]), rows * 2)
        tokens = self._bytes(number, shard, int(entry["tokens_offset"]), size * dtype.itemsize)
        if zlib.crc32(tokens, zlib.crc32(lengths)) != int(entry["crc32"]):
            raise DamageError(f"{self.where(number)} is damaged (its checksum differs)")
        row_lengths = np.frombuffer(lengths, "<u2").astype(np.int64)
        return Block(
            lengths=row_lengths,
            starts=np.cumsum(row_lengths) - row_lengths,
            tokens=np.frombuffer(tokens, dtype.newbyteorder("<")),
            weight=1.0,
        )

    def _bytes(self, number: int, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            path = Path(self.index.path) / self.index.shards[shard].name
            try:
                self._files[shard] = open(path, "rb", buffering=0)  # noqa: SIM115 kept open
            except OSError as error:
                raise DamageError(f"{self.where(number)}: {error.strerror}") from None
        content = os.pread(self._files[shard].fileno(), size, offset)
        if len(content) < size:
            raise DamageError(f"{self.where(number)} is cut off (the shard is too short)")
        return content

    def where(self, number: int) -> str:
        """Name a block for people: its shard, and its place within it."""
        shard = int(self.table[number]["shard"])
        in_shard = number - int(np.flatnonzero(self.table["shard"] == shard)[0])
        return f"{Path(self.index.path) / self.index.shards[shard].name}, block {in_shard}"
