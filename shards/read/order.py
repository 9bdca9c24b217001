"""The global order of sequences: a closed form of (seed, position).

It depends on neither the number of ranks nor restarts, and no random generator is involved whose
stream may change: every permutation is the stable argsort of an integer hash.

The N sequences of an epoch are all visited once before the next epoch begins. What there is of
full blocks lies in lanes, which take turns, group after group; a lane opens a window of blocks at a
time and visits their rows in permuted order. Which blocks a lane has, and how lanes take turns, is
what versions of the order differ in (`shards.read.orders`). The short block comes last. A small
data set has no lanes: it is one window.

What a lane visits from one position to another is thus one range of places. A batch is read lane
by lane, across all lanes, so that a rank that takes a slice of it reads its share of the lanes and
blocks, not all of them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

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


class Group(NamedTuple):
    """Lanes that take turns, of so many full blocks each."""

    lanes: int
    blocks: int


class Order(ABC):
    """Where the sequences at global positions lie.

    Args:
        block_rows: int [blocks], sequences in each block, all equal but for one shorter.
        seed: any integer.
        lanes: of the first group, the others have one block each; 0 for one window of all.
        window: full blocks that a lane of the first group opens at a time.

    Attributes:
        sequences: N, sequences in an epoch.
        groups: of lanes, in the order of their turns; the short block is a lane after them.
    """

    version: ClassVar[int]

    def __init__(self, block_rows: np.ndarray, seed: int, lanes: int, window: int):
        self.block_rows = np.asarray(block_rows, np.int64)
        self.seed, self.lanes, self.window = seed, lanes, window
        self.rows_per_block = int(self.block_rows.max())
        full = self.block_rows == self.rows_per_block
        if np.count_nonzero(~full) > 1:
            raise ValueError("at most one block may be shorter than the others")
        self.full, self.short = np.flatnonzero(full), np.flatnonzero(~full)
        self.lane_blocks, left_over = divmod(len(self.full), lanes) if lanes else (0, 0)
        self.groups = (
            [Group(lanes, self.lane_blocks), *(Group(n, 1) for n in self._left_over(left_over))]
            if self.lane_blocks
            else []
        )
        self.all_lanes = sum(group.lanes for group in self.groups) + 1
        self._across = np.concatenate(
            [np.arange(group.lanes) / group.lanes for group in self.groups] + [np.zeros(1)]
        )
        self.sequences = int(self.block_rows.sum())
        self.blocks_per_window = window if self.groups else len(self.block_rows)
        self._windows_per_lane = -(-self.lane_blocks // window)
        # What comes after the windows of the first group's lanes is counted as theirs are.
        self._first_lanes = np.cumsum([group.lanes for group in self.groups], dtype=np.int64)
        self._turns = self._windows_per_lane + max(1, len(self.groups))

    @abstractmethod
    def _left_over(self, blocks: int) -> list[int]:
        """Lanes of one block each for the full blocks that the first group has not, by group."""

    @abstractmethod
    def _begun(self, q: np.ndarray, lanes: int) -> np.ndarray:
        """How many places of each of some lanes come before place q of their turns, [n, lanes]."""

    @abstractmethod
    def _blocks(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The blocks of a window of a group's lane; lanes are counted through the groups."""

    def ranges(self, bounds: np.ndarray) -> Ranges:
        """What the batches between positions bounds[k] and bounds[k + 1] visit, lane by lane.

        Args:
            bounds: int64 [steps + 1], ascending, counted from 0 through all epochs.

        Returns:
            The ranges, by step; the left-over blocks are lanes of their own, and the short block
            or a small data set is the last lane.
        """
        cuts, step, epoch = self._pieces(bounds)
        place = self._visited(cuts[:-1] - epoch * self.sequences)
        count = self._visited(cuts[1:] - epoch * self.sequences) - place
        piece, lane = np.nonzero(count)
        since = epoch - bounds[step] // self.sequences
        return Ranges(
            step[piece],
            epoch[piece],
            lane,
            since[piece] + self._across[lane],
            place[piece, lane],
            count[piece, lane],
        )

    def share(self, bounds: np.ndarray, low: int, high: int) -> Ranges | None:
        """What `ranges` gives of some rows of each batch alone, in the order in which it is dealt.

        Args:
            bounds: as of `ranges`.
            low, high: of the rows, counted from the first of each batch.

        Returns:
            The ranges; None where several groups of lanes take part in an epoch of a batch, whose
            lanes then are not in the order in which they are dealt.
        """
        cuts, step, epoch = self._pieces(bounds)
        before = self._visited(cuts[:-1] - epoch * self.sequences)
        count = self._visited(cuts[1:] - epoch * self.sequences) - before
        firsts = np.concatenate([[0], self._first_lanes])
        if (np.add.reduceat(count, firsts, axis=1) > 0).sum(1).max() > 1:
            return None
        end = np.cumsum(count, axis=1)
        end += (cuts[:-1] - bounds[step])[:, None]
        begin = end - count
        piece, lane = np.nonzero((end > low) & (begin < high) & (count > 0))
        first = np.maximum(begin[piece, lane], low)
        size = np.minimum(end[piece, lane], high) - first
        place = before[piece, lane] + first - begin[piece, lane]
        across = self._across[lane] + (epoch - bounds[step] // self.sequences)[piece]
        return Ranges(step[piece], epoch[piece], lane, across, place, size)

    def _pieces(self, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where batches and epochs end, and each piece between these: its batch, its epoch."""
        epochs = np.arange(bounds[0] // self.sequences + 1, -(-bounds[-1] // self.sequences))
        cuts = np.unique(np.concatenate([bounds, epochs * self.sequences]))
        step = np.searchsorted(bounds, cuts[:-1], side="right") - 1
        return cuts, step, cuts[:-1] // self.sequences

    def _visited(self, q: np.ndarray) -> np.ndarray:
        """How many places of each lane come before place q of an epoch, int64 [n, all_lanes]."""
        visited = []
        for lanes, blocks in self.groups:
            in_turns = np.minimum(q, lanes * blocks * self.rows_per_block)
            visited.append(self._begun(in_turns, lanes))
            q = q - in_turns
        return np.concatenate([*visited, q[:, None]], axis=1)

    def cut(self, ranges: Ranges) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranges cut where they cross from one window of their lane into the next.

        Returns:
            int64 [parts]: the window's name for `window_of`, ascending with the order of the visit;
            the first place, counted from the window's; and how many places.
        """
        group = np.searchsorted(self._first_lanes, ranges.lane, side="right")
        first_group = (group == 0) & bool(self.groups)
        span = np.where(first_group, self.window * self.rows_per_block, self.sequences)
        first, end = ranges.place, ranges.place + ranges.size
        parts = (end - 1) // span - first // span + 1
        window = spread(first // span, parts)
        whole = np.repeat(np.arange(len(parts)), parts)
        begin = window * span[whole]
        first = np.maximum(first[whole], begin)
        count = np.minimum(end[whole], begin + span[whole]) - first
        after = self._windows_per_lane + np.maximum(group - 1, 0)
        window = np.where(first_group[whole], window, after[whole])
        turn = ranges.epoch[whole] * self._turns + window
        return turn * self.all_lanes + ranges.lane[whole], first - begin, count

    def window_of(self, name: int) -> Window:
        """A window by its name."""
        blocks = self.blocks_of(name)
        rows = int(self.block_rows[blocks].sum())
        return Window(blocks, permutation(rows, self.seed, *self._place(name)))

    def blocks_of(self, name: int) -> np.ndarray:
        """The blocks of a window, int64 [blocks]."""
        epoch, lane, window = self._place(name)
        if lane < self.all_lanes - 1:
            return self._blocks(epoch, lane, window)
        return self.short if self.groups else np.arange(len(self.block_rows))

    def _place(self, name: int) -> tuple[int, int, int]:
        """A window's epoch, its lane, and its number in that."""
        turn, lane = divmod(name, self.all_lanes)
        epoch, window = divmod(turn, self._turns)
        return epoch, lane, min(window, self._windows_per_lane)
