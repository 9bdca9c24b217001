"""Dealing: from global positions to the micro batches of one rank.

Shapes: B rows of one micro batch on this rank, T its padded length, G rows of a global batch, W
ranks, A micro batches of a rank in a step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from shards.read.dataset import Mixing
from shards.read.order import Ranges, spread
from shards.read.windows import Windows
from t5vae.common.errors import DamageError

ROUND = 8  # padded lengths are multiples of it: what matrix units like
PLANNED_ROWS, PLANNED_STEPS, PLANNED_RANGES = 16_384, 1024, 2**17  # found together at most


@dataclass(frozen=True)
class Batch:
    """One micro batch of one rank.

    Attributes:
        ids: int64 [B, T], padded with the dataset's pad id.
        lengths: int64 [B], end tokens included.
        weights: float32 [B], 0 for rows that stand in for damaged ones.
        sequence: int64 [B], the number of each sequence in its split, 0 .. N-1.
        source: int64 [B], which dataset of a mixture.
        consumed: the position to resume from once this batch is done: it moves by G with the
            last micro batch of a step.
        places: int64 [N], where the N real tokens of rows of weight 1 lie in the flattened ids.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    source: torch.Tensor
    consumed: int
    places: torch.Tensor

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        weights: torch.Tensor,
        sequence: torch.Tensor,
        source: torch.Tensor,
        consumed: int = 0,
    ) -> "Batch":
        """A batch on the CPU, whose places are found; arguments as the attributes."""
        real = torch.arange(ids.shape[1]) < torch.where(weights > 0, lengths, 0)[:, None]
        places = real.flatten().nonzero()[:, 0]
        return cls(ids, lengths, weights, sequence, source, consumed, places)

    def pinned(self) -> "Batch":
        """The same in page-locked memory."""
        return self._with(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from page-locked memory without waiting for it."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def used_by(self, stream: torch.Stream) -> None:
        """Keep the memory of its tensors until a stream is through with them."""
        for tensor in self._tensors.values():
            tensor.record_stream(stream)

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors.items()})


@dataclass
class Dealer:
    """Cuts global batches into this rank's micro batches.

    A global batch is read epoch by epoch, across the lanes of all sources. Rank r of W takes the
    r-th W-th of that, and micro batch m of A every A-th row of its share, so that each has some of
    each of its lanes. Sorted by length, its share is cut into A bands instead.
    """

    sources: list[Windows]
    mixing: Mixing
    global_batch_size: int
    rank: int
    world_size: int
    micro_batch_size: int
    sort_by_length: bool
    pad_to: int | None
    pin_memory: bool

    def __post_init__(self) -> None:
        self.max_length = max(source.index.max_length for source in self.sources)

    def afresh(self) -> "Dealer":
        """The same with nothing in memory, whatever becomes of what this one holds."""
        return replace(self, sources=[source.afresh() for source in self.sources])

    def plans(self, consumed: int) -> Iterator["Plan"]:
        """What to deal from a position on, for ever: first one step, then several at once.

        A plan's rows stay in memory while the next one is made.
        """
        steps = 1
        while True:
            try:
                plan = self._plan(consumed, steps)
            except DamageError:
                if steps == 1:
                    raise
                steps = 1  # deliver what comes before the damage
                continue
            yield plan
            consumed += steps * self.global_batch_size
            steps = min(2 * steps, self._most_steps)

    def batches(self, plan: "Plan") -> Iterator[Batch]:
        """The micro batches of a plan."""
        rows = plan.rows
        per_step = len(rows.sequence) // plan.steps
        longest = rows.lengths.max(axis=1).astype(np.int64)  # may be more than 16 bits once rounded
        widths = np.minimum(-(-longest // ROUND) * ROUND, self.max_length)
        lengths, weights, sequence, source = (
            torch.from_numpy(column).unbind()
            for column in (
                rows.lengths.astype(np.int64),
                rows.weights,
                rows.sequence,
                rows.source,
            )
        )
        for number, width in enumerate(widths.tolist()):
            batch = Batch.of(
                torch.from_numpy(self._gather(plan, number, self.pad_to or width)),
                lengths[number],
                weights[number],
                sequence[number],
                source[number],
                plan.consumed + (number + 1) // per_step * self.global_batch_size,
            )
            yield batch.pinned() if self.pin_memory else batch

    @property
    def _share(self) -> int:
        """This rank's rows of one step."""
        return self.global_batch_size // self.world_size

    @property
    def _most_steps(self) -> int:
        lanes = sum(source.order.all_lanes for source in self.sources)
        return max(1, min(PLANNED_ROWS // self._share, PLANNED_RANGES // lanes, PLANNED_STEPS))

    def _plan(self, consumed: int, steps: int) -> "Plan":
        """Bring this rank's share of several global batches into memory."""
        ranges, source = self._ranges(consumed, steps)
        at = np.cumsum(ranges.size) - ranges.size
        parts = []
        for number, part in enumerate(self.sources):
            own = np.flatnonzero(source == number)
            found = part.find(ranges.take(own))
            which = spread(at[own], ranges.size[own])
            parts.append((which, _Rows(*found, np.full(len(which), number))))
        for part in self.sources:  # not before all have found theirs: the last plan is in use
            part.settle()
        tokens = tuple(part.tokens for part in self.sources)
        return Plan(consumed, steps, tokens, self._deal(_Rows.merge(parts), steps))

    def _ranges(self, consumed: int, steps: int) -> tuple[Ranges, np.ndarray]:
        """What this rank has to find for several global batches, and the source of each range."""
        positions = consumed + np.arange(steps + 1) * self.global_batch_size
        if len(self.sources) == 1:
            low = self.rank * self._share
            own = self.sources[0].order.share(positions, low, low + self._share)
            if own is not None:
                return own, np.zeros(len(own.step), np.int64)
        bounds = self.mixing.taken(positions)
        each = [source.order.ranges(bounds[:, s]) for s, source in enumerate(self.sources)]
        ranges = Ranges(*map(np.concatenate, zip(*each, strict=True)))
        source = np.repeat(np.arange(len(each)), [len(r.step) for r in each])
        order = np.lexsort((ranges.across, ranges.step))
        ranges, source = ranges.take(order), source[order]
        return self._slice(ranges, source)

    def windows(self, consumed: int, steps: int) -> list[set[int]]:
        """The windows of each source that this rank opens for several global batches."""
        opened: list[set[int]] = [set() for _ in self.sources]
        for first in range(0, steps, self._most_steps):
            count = min(self._most_steps, steps - first)
            ranges, source = self._ranges(consumed + first * self.global_batch_size, count)
            for number, part in enumerate(self.sources):
                names, _, _ = part.order.cut(ranges.take(np.flatnonzero(source == number)))
                opened[number] |= set(np.unique(names).tolist())
        return opened

    def _slice(self, ranges: Ranges, source: np.ndarray) -> tuple[Ranges, np.ndarray]:
        """This rank's part of each step's ranges."""
        first = np.cumsum(ranges.size) - ranges.size
        begin = ranges.step * self.global_batch_size + self.rank * self._share
        low = np.maximum(first, begin)
        high = np.minimum(first + ranges.size, begin + self._share)
        mine = low < high
        place = ranges.place + low - first
        cut = ranges._replace(place=place, size=high - low)
        return cut.take(mine), source[mine]

    def _deal(self, rows: "_Rows", steps: int) -> "_Rows":
        """Rows [steps * share] as micro batches [steps * A, micro]."""
        micro = self.micro_batch_size
        if self.sort_by_length:
            by_length = np.argsort(rows.lengths.reshape(steps, -1), axis=1, kind="stable")
            by_length += np.arange(steps)[:, None] * self._share
            return rows.map(lambda column: column[by_length].reshape(-1, micro))
        return rows.map(
            lambda column: column.reshape(steps, micro, -1).swapaxes(1, 2).reshape(-1, micro)
        )

    def _gather(self, plan: "Plan", number: int, width: int) -> np.ndarray:
        starts, lengths = plan.rows.starts[number], plan.rows.lengths[number]
        if len(self.sources) == 1:
            return self.sources[0].gather(plan.tokens[0], starts, lengths, width)
        ids = np.empty((len(starts), width), np.int64)
        for of, (part, tokens) in enumerate(zip(self.sources, plan.tokens, strict=True)):
            own = np.flatnonzero(plan.rows.source[number] == of)
            ids[own] = part.gather(tokens, starts[own], lengths[own], width)
        return ids


class Plan(NamedTuple):
    """Some steps of one rank: which rows, and where they are in memory."""

    consumed: int
    """The position of the first."""
    steps: int
    tokens: tuple[np.ndarray, ...]
    """Of each source."""
    rows: "_Rows"


class _Rows(NamedTuple):
    """Rows in memory, columns as in `Found` and `Batch`: [rows], once dealt [micro batches, B]."""

    starts: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray
    sequence: np.ndarray
    source: np.ndarray

    @staticmethod
    def merge(parts: list[tuple[np.ndarray, "_Rows"]]) -> "_Rows":
        """Plans of the sources, each with the places of its rows among all, int64 [its rows]."""
        if len(parts) == 1:
            return parts[0][1]
        place = np.argsort(np.concatenate([at for at, _ in parts]))
        columns = zip(*(part for _, part in parts), strict=True)
        return _Rows(*(np.concatenate(column)[place] for column in columns))

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "_Rows":
        return _Rows(*map(change, self))
