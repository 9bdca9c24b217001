"""The global order of sequences: a closed form of (seed, position).

It depends on neither the number of ranks nor restarts, and no random generator is involved whose
stream may change: every permutation is the stable argsort of an integer hash.

The N sequences of an epoch are all visited once before the next epoch begins. Each epoch permutes
the full blocks and deals them to `lanes` lanes; a lane opens `window` blocks at a time and visits
their rows in permuted order. The lanes take turns of `chunk` rows: position g of the stream is

    epoch, q = divmod(g, N);  turn, rest = divmod(q, chunk * lanes);  lane, o = divmod(rest, chunk)

the row at place turn * chunk + o of that lane. The full blocks that are left over, fewer than
`lanes`, are one lane each and take turns in the same way; the short block comes last. With fewer
full blocks than lanes all are one window: a small data set is wholly shuffled.

What a lane visits from one position to another is thus one range of places. A batch is read lane
by lane, across all lanes, so that a rank that takes a slice of it reads its share of the lanes and
blocks, not all of them.
"""

from typing import NamedTuple

import numpy as np

ORDER_VERSION = 2
LANES, WINDOW, CHUNK = 64, 4, 16
MASK = 2**64 - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash uint64 [n] to uint64 [n], one to one (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_state(*key: int) -> np.uint64:
    """The hash of a key of integers."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part & MASK))
    return state[0]


def permutation(n: int, *key: int) -> np.ndarray:
    """The permutation of 0 .. n-1 that belongs to a key of integers, int64 [n].

    The stable argsort of 32 bits of a hash, as two passes over 16 bits: numpy sorts those by radix.
    """
    hashed = splitmix64(np.arange(n, dtype=np.uint64) ^ key_state(*key)).astype(np.uint32)
    order = np.argsort(hashed.astype(np.uint16), kind="stable")
    return order[np.argsort((hashed >> 16).astype(np.uint16)[order], kind="stable")]


class Ranges(NamedTuple):
    """Ranges of places, each in one lane of one epoch; all [ranges], int64 but for `across`.

    `across` is float64: epochs since the step began, and where the lane lies among those it takes
    turns with, from 0 to below 1.
    """

    step: np.ndarray
    epoch: np.ndarray
    lane: np.ndarray
    across: np.ndarray
    place: np.ndarray
    size: np.ndarray

    def take(self, which: np.ndarray) -> "Ranges":
        """Some of the ranges."""
        return Ranges(*(column[which] for column in self))


def spread(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate arange(starts[i], starts[i] + counts[i]) for all i, without a loop."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


class Window(NamedTuple):
    """Rows that are shuffled together: those of `blocks`, counted through them, at `places`."""

    blocks: np.ndarray  # int64 [blocks]
    places: np.ndarray  # int64 [rows], a permutation


class Order:
    """Where the sequences at global positions lie.

    Args:
        block_rows: int [blocks], sequences in each block, all equal but for one shorter.
        seed: any integer.
        lanes, window, chunk: the shape of the order.

    Attributes:
        sequences: N, sequences in an epoch.
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
        self.lane_blocks, left_over = divmod(len(self.full), lanes)
        if self.lane_blocks and self.rows_per_block % chunk:
            raise ValueError(f"chunk {chunk} must divide {self.rows_per_block} rows of a block")
        self.groups = [(lanes, self.lane_blocks), (left_over, 1)] if self.lane_blocks else []
        self.all_lanes = sum(lanes for lanes, _ in self.groups) + 1
        self._across = np.concatenate([np.arange(n) / max(1, n) for n, _ in self.groups] + [[0.0]])
        self.sequences = int(self.block_rows.sum())
        self.blocks_per_window = window if self.lane_blocks else len(self.block_rows)
        self._windows_per_lane = -(-self.lane_blocks // window)
        self._epochs: dict[int, np.ndarray] = {}

    def ranges(self, bounds: np.ndarray) -> Ranges:
        """What the batches between positions bounds[k] and bounds[k + 1] visit, lane by lane.

        Args:
            bounds: int64 [steps + 1], ascending, counted from 0 through all epochs.

        Returns:
            The ranges, by step; the left-over blocks are lanes of their own, and the short block
            or a small data set is the last lane.
        """
        epochs = np.arange(bounds[0] // self.sequences + 1, -(-bounds[-1] // self.sequences))
        cuts = np.unique(np.concatenate([bounds, epochs * self.sequences]))
        start, end = cuts[:-1], cuts[1:]
        epoch = start // self.sequences
        first, last = start - epoch * self.sequences, end - epoch * self.sequences
        place = self._visited(first)
        count = self._visited(last) - place
        piece, lane = np.nonzero(count)
        step = np.searchsorted(bounds, start, side="right") - 1
        since = epoch - bounds[step] // self.sequences
        return Ranges(
            step[piece],
            epoch[piece],
            lane,
            since[piece] + self._across[lane],
            place[piece, lane],
            count[piece, lane],
        )

    def _visited(self, q: np.ndarray) -> np.ndarray:
        """How many places of each lane come before place q of an epoch, int64 [n, all_lanes]."""
        visited = []
        for lanes, blocks in self.groups:
            in_turns = np.minimum(q, lanes * blocks * self.rows_per_block)
            turn, rest = np.divmod(in_turns, self.chunk * max(1, lanes))
            begun = np.clip(rest[:, None] - self.chunk * np.arange(lanes), 0, self.chunk)
            visited.append(turn[:, None] * self.chunk + begun)
            q = q - in_turns
        return np.concatenate([*visited, q[:, None]], axis=1)

    def cut(self, ranges: Ranges) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranges cut where they cross from one window of their lane into the next.

        Returns:
            int64 [parts]: the window's name for `window_of`, ascending with the order of the visit;
            the first place, counted from the window's; and how many places.
        """
        dealt = ranges.lane < self.lanes if self.groups else np.zeros(len(ranges.lane), bool)
        span = np.where(dealt, self.window * self.rows_per_block, self.sequences)
        first, end = ranges.place, ranges.place + ranges.size
        parts = (end - 1) // span - first // span + 1
        window = spread(first // span, parts)
        whole = np.repeat(np.arange(len(parts)), parts)
        begin = window * span[whole]
        first = np.maximum(first[whole], begin)
        count = np.minimum(end[whole], begin + span[whole]) - first
        window[~dealt[whole]] = self._windows_per_lane  # after those of the lanes before
        turn = ranges.epoch[whole] * (self._windows_per_lane + 1) + window
        return turn * self.all_lanes + ranges.lane[whole], first - begin, count

    def window_of(self, name: int) -> Window:
        """A window by its name."""
        turn, lane = divmod(name, self.all_lanes)
        epoch, window = divmod(turn, self._windows_per_lane + 1)
        if lane == self.all_lanes - 1:
            blocks = self.short if self.lane_blocks else np.arange(len(self.block_rows))
        else:
            permuted = self._epoch(epoch)
            dealt = self.lanes * self.lane_blocks
            if lane < self.lanes:
                of_lane = permuted[lane : dealt : self.lanes]
                blocks = of_lane[window * self.window : (window + 1) * self.window]
            else:
                blocks = permuted[dealt + lane - self.lanes][None]
        rows = int(self.block_rows[blocks].sum())
        return Window(blocks, permutation(rows, self.seed, epoch, lane, window))

    def _epoch(self, epoch: int) -> np.ndarray:
        """The full blocks in an epoch's order; that of the epoch before is kept too."""
        if epoch not in self._epochs:
            self._epochs = {e: blocks for e, blocks in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = self.full[permutation(len(self.full), self.seed, epoch)]
        return self._epochs[epoch]
