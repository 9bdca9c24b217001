"""The versions of the order: a position that was saved is worth something only in its own."""

from collections.abc import Callable
from functools import cache

import numpy as np

from shards.format.blocks import BlockReader
from shards.read.order import Order, key_state, permutation

CHUNK = 16  # rows of a turn in version 2, of which those of a full block are a multiple
WHOLE = 64  # fewer full blocks than that are shuffled as a whole
SHARE = 1 / 4  # of the full blocks, the most that are open at a time
MOST_LANES = 2048
MOST_OPEN = 384 * 2**20  # bytes of the blocks that are open
ROW_BYTES = 16  # of a sequence in an open window, besides its tokens
RUN = 32  # blocks of a lane that are visited one soon after the other


class RegionOrder(Order):
    """Version 3: each lane has a region of the split, the same in all epochs.

    With F full blocks, lane l of L, a power of two, has those from l F / L on, rounded down: n of
    them, or n + 1. Ranks that lie beside each other, as those of a node do, thus read what lies
    beside each other, and in each epoch the same. Runs of 32 blocks are permuted in each epoch, and
    the blocks of each; n blocks of all lanes are visited first. The lanes take turns of a row, in
    the order of their numbers' reversed bits (van der Corput's sequence), so that any few
    sequences in a row are of lanes all over the split, and ranks' shares of them of their own
    lanes. The m lanes that have a block left then take turns in groups: each of the largest power
    of two that is left, from all over the split.

    Args:
        lanes: L; 0 for a data set that is one window.
    """

    version = 3

    def __init__(self, block_rows: np.ndarray, seed: int, lanes: int):
        super().__init__(block_rows, seed, lanes, window=1)
        self._bounds = np.arange(lanes + 1) * len(self.full) // max(1, lanes)

    @staticmethod
    def lanes_of(blocks: int, block_bytes: float) -> int:
        """How many lanes a data set is given.

        Args:
            blocks: full ones.
            block_bytes: of one, in memory.
        """
        if blocks < WHOLE:
            return 0
        most = min(MOST_LANES, blocks * SHARE, max(1, MOST_OPEN // block_bytes))
        return 1 << int(most).bit_length() - 1

    def _left_over(self, blocks: int) -> list[int]:
        counts = np.diff(np.arange(self.lanes + 1) * len(self.full) // self.lanes)
        left = np.flatnonzero(counts > self.lane_blocks)
        groups, self._extra = [], []
        while len(left):
            lanes = 1 << len(left).bit_length() - 1
            picked = (2 * np.arange(lanes) + 1) * len(left) // (2 * lanes)
            self._extra += left[picked].tolist()
            groups.append(lanes)
            left = np.delete(left, picked)
        return groups

    def _begun(self, q: np.ndarray, lanes: int) -> np.ndarray:
        turn, rest = np.divmod(q, lanes)
        return turn[:, None] + (reversed_bits(lanes) < rest[:, None])

    def _blocks(self, epoch: int, lane: int, window: int) -> np.ndarray:
        if lane >= self.lanes:
            lane, window = self._extra[lane - self.lanes], self.lane_blocks
        first, blocks = self._bounds[lane], self._bounds[lane + 1] - self._bounds[lane]
        runs, last = divmod(int(blocks), RUN)
        run, place = divmod(window, RUN)
        if run < runs:
            run = int(permutation(runs, self.seed, epoch, lane)[run])
        place = permutation(RUN if run < runs else last, self.seed, epoch, lane, run, 0)[place]
        begin = int(key_state(self.seed, epoch, lane) % np.uint64(blocks))
        return self.full[first + (begin + run * RUN + place) % blocks][None]


class DealtOrder(Order):
    """Version 2, which runs began with before there was version 3.

    Each epoch permutes the full blocks and deals them to the lanes, one after the other; those that
    are left over are one lane each. The lanes take turns of `chunk` rows, so that position g is

        epoch, q = divmod(g, N);  turn, rest = divmod(q, chunk * lanes);  lane, o = divmod(rest,
        chunk)

    the row at place turn * chunk + o of that lane. With fewer full blocks than lanes all are one
    window.
    """

    version = 2

    def __init__(
        self,
        block_rows: np.ndarray,
        seed: int,
        lanes: int = 64,
        window: int = 4,
        chunk: int = CHUNK,
    ):
        super().__init__(block_rows, seed, lanes, window)
        self.chunk = chunk
        if self.lane_blocks and self.rows_per_block % chunk:
            raise ValueError(f"chunk {chunk} must divide {self.rows_per_block} rows of a block")
        self._epochs: dict[int, np.ndarray] = {}

    def _left_over(self, blocks: int) -> list[int]:
        return [blocks] if blocks else []

    def _begun(self, q: np.ndarray, lanes: int) -> np.ndarray:
        turn, rest = np.divmod(q, self.chunk * lanes)
        begun = np.clip(rest[:, None] - self.chunk * np.arange(lanes), 0, self.chunk)
        return turn[:, None] * self.chunk + begun

    def _blocks(self, epoch: int, lane: int, window: int) -> np.ndarray:
        permuted = self._epoch(epoch)
        dealt = self.lanes * self.lane_blocks
        if lane >= self.lanes:
            return permuted[dealt + lane - self.lanes][None]
        of_lane = permuted[lane : dealt : self.lanes]
        return of_lane[window * self.window : (window + 1) * self.window]

    def _epoch(self, epoch: int) -> np.ndarray:
        """The full blocks in an epoch's order; that of the epoch before is kept too."""
        if epoch not in self._epochs:
            self._epochs = {e: blocks for e, blocks in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self.full[permutation(len(self.full), self.seed, epoch)]
        return self._epochs[epoch]


@cache
def reversed_bits(numbers: int) -> np.ndarray:
    """Each of 0 .. numbers - 1, a power of two of them, with its bits reversed, int64 [numbers]."""
    found = np.zeros(1, np.int64)
    while len(found) < numbers:
        found = np.concatenate([2 * found, 2 * found + 1])
    return found


def _in_regions(reader: BlockReader, seed: int) -> Order:
    rows = reader.table["sequences"]
    full = int(np.count_nonzero(rows == rows.max()))
    size = reader.table["tokens"].mean() * reader.dtype.itemsize + ROW_BYTES * rows.mean()
    return RegionOrder(rows, seed, RegionOrder.lanes_of(full, float(size)))


def _dealt(reader: BlockReader, seed: int) -> Order:
    return DealtOrder(reader.table["sequences"], seed)


ORDERS: dict[int, Callable[[BlockReader, int], Order]] = {2: _dealt, 3: _in_regions}
NEWEST = max(ORDERS)
