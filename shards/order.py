"""The global order of sequences: a closed form of (seed, position).

It depends on neither the number of ranks nor restarts, and no random generator is involved whose
stream may change: every permutation is the stable argsort of an integer hash.
"""

from functools import lru_cache

import numpy as np

ORDER_VERSION = 1
LANES, WINDOW, CHUNK = 64, 4, 16
TAIL = -1  # the lane number of what fills no lane
MASK = 2**64 - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash uint64 [n] to uint64 [n] (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """The permutation of 0 .. n-1 that belongs to a key of integers, int64 [n]."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part & MASK))
    return np.argsort(splitmix64(np.arange(n, dtype=np.uint64) ^ state), kind="stable")


class Order:
    """Where the sequence at a global position lies: (block, row).

    The N sequences of an epoch are all visited once before the next epoch begins. Each epoch
    permutes the full blocks and deals them to `lanes` equal lanes; a lane opens `window` blocks at
    a time and visits their rows in permuted order; consecutive positions take `chunk` rows from
    one lane, then from the next. Blocks left over (fewer than `lanes`, and the short one) follow
    as one window of their own: a small data set is all of it, and so wholly shuffled.

    Args:
        block_rows: int [blocks], sequences in each block, all equal but for one shorter.
        seed: any integer.
        lanes, window, chunk: the shape of the order; chunk must divide the rows of a block.
    """

    def __init__(
        self,
        block_rows: np.ndarray,
        seed: int,
        lanes: int = LANES,
        window: int = WINDOW,
        chunk: int = CHUNK,
    ):
        self.block_rows = np.asarray(block_rows, np.int64)
        self.seed, self.lanes, self.window, self.chunk = seed, lanes, window, chunk
        self.rows_per_block = int(self.block_rows.max())
        full = self.block_rows == self.rows_per_block
        if np.count_nonzero(~full) > 1:
            raise ValueError("at most one block may be shorter than the others")
        self.full, self.short = np.flatnonzero(full), np.flatnonzero(~full)
        self.lane_blocks = len(self.full) // lanes
        self.lane_rows = self.lane_blocks * self.rows_per_block
        if self.lane_blocks and self.rows_per_block % chunk:
            raise ValueError(f"chunk {chunk} must divide {self.rows_per_block} rows of a block")
        self.sequences = int(self.block_rows.sum())
        self._blocks = lru_cache(maxsize=2)(self._permuted_blocks)
        self._window = lru_cache(maxsize=2 * lanes + 2)(self._permuted_window)

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find sequences by global position.

        Args:
            positions: int64 [n], counted from 0 through all epochs (epoch = position // N).

        Returns:
            block int64 [n] and row int64 [n] within it.
        """
        epoch, q = np.divmod(np.asarray(positions, np.int64), self.sequences)
        j, o = np.divmod(q, self.chunk)
        in_lane = q < self.lanes * self.lane_rows
        lane = np.where(in_lane, j % self.lanes, TAIL)
        place = np.where(in_lane, j // self.lanes * self.chunk + o, q - self.lanes * self.lane_rows)
        window, slot = np.divmod(place, self.window * self.rows_per_block)
        window, slot = np.where(in_lane, window, 0), np.where(in_lane, slot, place)

        block, row = np.empty_like(q), np.empty_like(q)
        groups, member = np.unique(np.stack([epoch, lane, window]), axis=1, return_inverse=True)
        for number, group in enumerate(groups.T.tolist()):
            mine = np.flatnonzero(member == number)
            blocks, slots = self._window(*group)
            place = slots[slot[mine]]
            block[mine] = blocks[place // self.rows_per_block]
            row[mine] = place % self.rows_per_block
        return block, row

    def _permuted_blocks(self, epoch: int) -> np.ndarray:
        return self.full[permutation(len(self.full), self.seed, epoch)]

    def _permuted_window(self, epoch: int, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of one window, and its rows' permuted places counted through them."""
        dealt = self.lanes * self.lane_blocks
        if lane == TAIL:
            blocks = np.concatenate([self._blocks(epoch)[dealt:], self.short])
        else:
            of_lane = self._blocks(epoch)[lane : dealt : self.lanes]
            blocks = of_lane[window * self.window : (window + 1) * self.window]
        rows = int(self.block_rows[blocks].sum())
        return blocks, permutation(rows, self.seed, epoch, lane, window).astype(np.uint32)
