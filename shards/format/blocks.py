"""Reading blocks: bytes at known offsets of a shard, checked."""

import zlib

import numpy as np

from shards.format.index import Index
from t5vae.common.errors import DamageError


class BlockReader:
    """Reads the blocks of one split, each checked against its crc32.

    Args:
        index: the dataset.
        split: the split's name.

    Attributes:
        table: BLOCK [blocks], the split's blocks.
        first: int64 [blocks], the number of each block's first sequence.
    """

    def __init__(self, index: Index, split: str):
        self.index = index
        self.table = index.split_blocks(split)
        rows = self.table["sequences"].astype(np.int64)
        self.first = np.cumsum(rows) - rows

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One block of the split: lengths uint16 [rows], tokens uint16 or uint32 [their sum].

        Raises:
            DamageError: its bytes are missing or not those that were written.
        """
        try:
            return self._read(number)
        except DamageError:
            shard = self.index.shards[self.table[number]["shard"]]
            if self.index.store.forget(shard.name):  # this machine's copy was damaged
                return self._read(number)
            raise

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        entry = self.table[number]
        begin, gap = int(entry["lengths_offset"]), int(entry["tokens_offset"])
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        size = gap + int(entry["tokens"]) * dtype.itemsize - begin
        try:
            content = self.index.store.read(self.index.shards[entry["shard"]].name, begin, size)
        except OSError as error:
            raise DamageError(f"{self.where(number)}: {error.strerror or error}") from None
        if len(content) < size:
            raise DamageError(f"{self.where(number)} is cut off (the shard is too short)")
        lengths = np.frombuffer(content, "<u2", int(entry["sequences"]))
        tokens = np.frombuffer(content, dtype, int(entry["tokens"]), gap - begin)
        if zlib.crc32(tokens.data, zlib.crc32(lengths.data)) != int(entry["crc32"]):
            raise DamageError(f"{self.where(number)} is damaged (its checksum differs)")
        return lengths, tokens

    def where(self, number: int) -> str:
        """Name a block for people: its shard, and its place within it."""
        shard = int(self.table[number]["shard"])
        in_shard = number - int(np.searchsorted(self.table["shard"], shard))
        return f"{self.index.path}/{self.index.shards[shard].name}, block {in_shard}"
