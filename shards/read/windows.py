"""Windows in memory: the rows that a stream draws from, found and gathered without a loop.

Shapes: n sequences, T tokens of the longest of them or more.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from shards.format.blocks import BlockReader
from shards.format.index import Index
from shards.read.order import Order, Ranges, Window, spread
from t5vae.common.errors import DamageError

LENGTH_BYTES = 2  # of a sequence in its block
TABLED = 256  # the widest rows whose masks are looked up: twice as fast, and at most 0.3 MB each
logger = logging.getLogger("shards")


class Found(NamedTuple):
    """Sequences in memory, until what was found after them is settled.

    Attributes:
        starts: int64 [n], where each begins in `Windows.tokens`.
        lengths: uint16 [n].
        weights: float32 [n], 0 for a damaged block's stand-ins and 1 otherwise.
        sequence: int64 [n], its number in the split.
    """

    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    sequence: np.ndarray


class _Block(NamedTuple):
    """A block's rows; a place is the start in its tokens << 17 | the weight << 16 | the length."""

    places: np.ndarray  # int64 [rows]
    tokens: np.ndarray
    sequence: np.ndarray  # int64 [rows]


class Windows:
    """The windows of an order that are visited now, each with its rows in the order of the visit.

    A rank holds one or two windows of every lane it reads: one of a block of 4,096 sequences of 14
    tokens takes 0.18 MB, the 2,048 lanes that a single rank reads at most up to 720 MB.

    Args:
        index: of the dataset.
        reader: of the split.
        order: of its sequences.
        stand_in: whether a damaged block is replaced by rows of one end token and weight 0
            instead of raising.

    Attributes:
        tokens: uint16 or uint32, those of all windows; replaced by a longer array at need.
        damaged: the blocks that were replaced, and why.
    """

    def __init__(self, index: Index, reader: BlockReader, order: Order, stand_in: bool = False):
        self.index, self.reader, self.order, self.stand_in = index, reader, order, stand_in
        self.damaged: dict[int, str] = {}
        blocks = order.blocks_per_window
        self._rows = blocks * order.rows_per_block
        of_blocks = reader.table["tokens"].astype(np.int64)
        self._size = int(min(blocks * of_blocks.max(), of_blocks.sum()))
        self._slots: dict[int, int] = {}  # of each window, by its name
        self._free: list[int] = []
        self._places = np.empty((0, self._rows), np.int64)
        self._sequence = np.empty((0, self._rows), np.int64)
        self._sought = self._settled = 0  # windows before these were not looked for
        self.tokens = np.empty(index.max_length, index.dtype)

    def find(self, ranges: Ranges) -> Found:
        """Bring the sequences of ranges into memory; n is the sum of their sizes.

        Positions only grow: windows before all those that were settled last are given up.

        Raises:
            DamageError: a block's bytes are missing or not those that were written.
            StorageError: the storage failed for minutes.
            UserError: a block may not be read.
        """
        names, first, count = self.order.cut(ranges)
        wanted, which = np.unique(names, return_inverse=True)
        missing = [name for name in wanted.tolist() if name not in self._slots]
        if missing:
            for name in [name for name in self._slots if name < self._settled]:
                self._free.append(self._slots.pop(name))
            self._make_room(len(missing))
            windows = [self.order.window_of(name) for name in missing]
            blocks = self._blocks([number for w in windows for number in w.blocks.tolist()])
            for name, window in zip(missing, windows, strict=True):
                self._fill(self._free[-1], window, blocks)
                self._slots[name] = self._free.pop()
        earliest = min(wanted.tolist(), default=0)
        self._sought = earliest - earliest % self.order.all_lanes
        slots = np.array([self._slots[name] for name in wanted.tolist()], np.int64)
        at = spread(slots[which] * self._rows + first, count)
        places = self._places.ravel()[at]
        weights = np.ones(len(at), np.float32)
        if self.damaged:
            weights[:] = places >> 16 & 1
        lengths = places.astype(np.uint16)  # its low 16 bits
        return Found(places >> 17, lengths, weights, self._sequence.ravel()[at])

    def bytes_of(self, names: set[int]) -> int:
        """What is read to open windows: their blocks' arrays, tar headers apart."""
        table = self.reader.table
        blocks = [self.order.blocks_of(name) for name in sorted(names)]
        own = table[np.concatenate(blocks)] if blocks else table[:0]
        item = self.tokens.dtype.itemsize
        return int(own["tokens"].sum()) * item + int(own["sequences"].sum()) * LENGTH_BYTES

    def afresh(self) -> "Windows":
        """The same with nothing in memory."""
        return Windows(self.index, self.reader, self.order, self.stand_in)

    def settle(self) -> None:
        """Say that what was found last is in use now, and all that was found before no more."""
        self._settled = self._sought

    def gather(
        self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int
    ) -> np.ndarray:
        """The tokens of found sequences, int64 [n, width], padded with the index's pad_id.

        Args:
            tokens: `self.tokens` as it was when they were found.
            starts, lengths: as found, [n].
            width: T, at least the longest of them.
        """
        index = self.index
        most = min(width, index.max_length)
        # A row is one copy of its bytes and those that follow, from a view of every position.
        row = np.dtype((np.void, most * tokens.itemsize))
        rows = np.ndarray(len(tokens) - most + 1, row, tokens, strides=tokens.strides)
        ids = rows[starts].view(tokens.dtype).reshape(len(starts), most)
        ids &= _own_tokens(lengths, most, tokens.dtype)
        wide = ids.astype(np.int64)
        if index.pad_id:
            wide[np.arange(most) >= lengths[:, None]] = index.pad_id
        if most < width:
            padding = ((0, 0), (0, width - most))
            wide = np.pad(wide, padding, constant_values=index.pad_id)
        return wide

    def _make_room(self, count: int) -> None:
        more = count - len(self._free)
        if more > 0:
            held = len(self._places)
            self._free = [*range(held, held + more), *self._free]
            self._places = _longer(self._places, more)
            self._sequence = _longer(self._sequence, more)
            self.tokens = _longer(self.tokens, more * self._size)

    def _blocks(self, numbers: list[int]) -> Iterator[_Block]:
        readers = self.index.store.readers
        if readers == 1:
            yield from map(self._block, numbers)
        else:
            # The process waits for the pool's threads as it exits, so they wait for no weather.
            with ThreadPoolExecutor(readers) as pool:
                blocks = pool.map(self._try_block, numbers)
                for number, block in zip(numbers, blocks, strict=True):
                    yield block or self._block(number)

    def _try_block(self, number: int) -> _Block | None:
        try:
            return self._block(number, self.reader.try_read)
        except OSError:
            return None

    def _block(self, number: int, read: Callable | None = None) -> _Block:
        sequence = self.reader.first[number] + np.arange(self.reader.table[number]["sequences"])
        try:
            lengths, tokens = (read or self.reader.read)(number)
        except DamageError as error:
            if not self.stand_in:
                raise
            self.damaged[number] = str(error)
            logger.warning("%s: its sequences get weight 0", error)
            end = np.full(1, self.index.eos_id, self.tokens.dtype)
            places = np.zeros(len(sequence), np.int64) + 1
            return _Block(places, end, sequence)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return _Block(starts << 17 | 1 << 16 | lengths, tokens, sequence)

    def _fill(self, slot: int, window: Window, blocks: Iterator[_Block]) -> None:
        begin = slot * self._size
        places, sequence = [], []
        for block in islice(blocks, len(window.blocks)):
            self.tokens[begin : begin + len(block.tokens)] = block.tokens
            places.append(block.places + (begin << 17))
            sequence.append(block.sequence)
            begin += len(block.tokens)
        rows = len(window.places)
        self._places[slot, :rows] = np.concatenate(places)[window.places]
        self._sequence[slot, :rows] = np.concatenate(sequence)[window.places]


def _own_tokens(lengths: np.ndarray, width: int, dtype: np.dtype) -> np.ndarray:
    """A mask of all bits in the columns that belong to each row, [n, width]."""
    if width > TABLED:
        return -(np.arange(width, dtype=np.uint16) < lengths[:, None]).astype(dtype)
    return _own_tokens_of_each_length(width, dtype).take(lengths, axis=0)


@lru_cache
def _own_tokens_of_each_length(width: int, dtype: np.dtype) -> np.ndarray:
    own = np.arange(width) < np.arange(width + 1)[:, None]
    return -own.astype(dtype)


def _longer(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.empty((rows, *array.shape[1:]), array.dtype)])
