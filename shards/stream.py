"""The stream of batches: what a rank trains on, exactly, from any position, for ever.

Shapes: B rows of one micro batch on this rank, T its padded length, G rows of a global batch.
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shards.blocks import BlockReader
from shards.errors import UserError
from shards.index import open_index
from shards.order import LANES, ORDER_VERSION, WINDOW, Order

ROUND = 8  # padded lengths are multiples of it: what matrix units like


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
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor
    sequence: torch.Tensor
    source: torch.Tensor
    consumed: int


class ShardStream:
    """Batches of a dataset in an order that only the seed and the position determine.

    Every rank asks for the same global batches and takes its own share of each, so that any world
    size that divides the global batch sees the same sequences, and a run resumes from one integer.

    Args:
        path: the dataset folder.
        split: the split's name.
        seed: of the order.
        global_batch_size: G, sequences in one step over all ranks.
        rank, world_size: this process among all.
        micro_batch_size: rows of one batch; G / world_size by default.
        consumed: the global position to start from.
        on_corrupt: "error" raises at a damaged block; "skip" puts rows of one end token and
            weight 0 in its rows' places, counted by `quarantined`.
        sort_by_length: deal each global batch by length, so that micro batches need less padding.
            Which sequences a global batch holds does not change.
        pad_to: a fixed T; by default each batch's longest, rounded up to 8 within max_length.
        prefetch: batches made ahead by one thread.

    Raises:
        UserError: no such dataset or split, or sizes that do not divide.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        consumed: int = 0,
        on_corrupt: Literal["error", "skip"] = "error",
        sort_by_length: bool = False,
        pad_to: int | None = None,
        prefetch: int = 2,
    ):
        if global_batch_size % world_size:
            raise UserError(
                f"a global batch of {global_batch_size} cannot be shared by {world_size} ranks: "
                "choose a multiple"
            )
        share = global_batch_size // world_size
        micro = micro_batch_size or share
        if share % micro:
            raise UserError(
                f"a rank's {share} rows of a global batch do not divide into micro batches of "
                f"{micro}: choose a divisor"
            )
        index = open_index(path)
        if pad_to is not None and pad_to < index.max_length:
            raise UserError(
                f"pad_to {pad_to} is shorter than the longest sequences of {path} "
                f"({index.max_length} tokens)"
            )
        reader = BlockReader(index, split, keep=LANES * (WINDOW + 1), stand_in=on_corrupt == "skip")
        order = Order(reader.table["sequences"], seed)
        self.index = index
        self.consumed = consumed
        self._dealer = _Dealer(
            reader, order, global_batch_size, rank, world_size, micro, sort_by_length, pad_to
        )
        self._prefetch = prefetch
        self._batches: queue.Queue[Batch | Exception] | None = None
        self._stop = lambda: None

    @property
    def quarantined(self) -> int:
        """How many damaged blocks were replaced so far."""
        return len(self._dealer.reader.damaged)

    def __iter__(self) -> "ShardStream":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._start()
        assert self._batches is not None
        batch = self._batches.get()
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self.consumed = batch.consumed
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        order = self._dealer.order
        return {
            "order_version": ORDER_VERSION,
            "index_sha256": self.index.sha256,
            "seed": order.seed,
            "lanes": order.lanes,
            "window": order.window,
            "chunk": order.chunk,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: the state belongs to another order: another dataset or seed.
        """
        for name, here in self.state_dict().items():
            if name != "consumed" and state.get(name) != here:
                raise UserError(
                    f"cannot resume: the saved {name} is {state.get(name)}, but {self.index.path} "
                    f"gives {here}"
                )
        self.close()
        self.consumed = state["consumed"]

    def close(self) -> None:
        """End the thread. Another batch asked for starts it again at `consumed`."""
        self._stop()
        self._batches = None

    def __enter__(self) -> "ShardStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._batches = queue.Queue(self._prefetch)
        stop = threading.Event()
        thread = threading.Thread(
            target=_fill,
            args=(self._dealer, self.consumed, self._batches, stop),
            name="shards-prefetch",
            daemon=True,
        )

        def end() -> None:
            stop.set()
            if thread is not threading.current_thread():  # where garbage is collected is chance
                thread.join()

        self._stop = weakref.finalize(self, end)  # also when the stream is merely dropped
        thread.start()


def _fill(dealer: "_Dealer", consumed: int, batches: "queue.Queue", stop: threading.Event) -> None:
    """The thread: it knows the dealer but not the stream, so that a dropped stream can end it."""
    source: Iterator[Batch | Exception] = dealer.batches(consumed)
    while not stop.is_set():
        try:
            batch: Batch | Exception = next(source)
        except Exception as error:
            batch = error
        while not stop.is_set():
            try:
                batches.put(batch, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(batch, Exception):
            return


@dataclass
class _Dealer:
    """Cuts global batches into this rank's micro batches."""

    reader: BlockReader
    order: Order
    global_batch_size: int
    rank: int
    world_size: int
    micro_batch_size: int
    sort_by_length: bool
    pad_to: int | None

    def batches(self, consumed: int) -> Iterator[Batch]:
        while True:
            blocks, rows = self._share(consumed)
            after = consumed + self.global_batch_size
            for start in range(0, len(blocks), self.micro_batch_size):
                part = slice(start, start + self.micro_batch_size)
                last = part.stop == len(blocks)
                yield self._batch(blocks[part], rows[part], after if last else consumed)
            consumed = after

    def _share(self, consumed: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.global_batch_size // self.world_size
        first = self.rank * size
        if not self.sort_by_length:
            return self.order.rows(consumed + np.arange(first, first + size))
        blocks, rows = self.order.rows(consumed + np.arange(self.global_batch_size))
        by_length = np.argsort(self.reader.lengths(blocks, rows), kind="stable")
        mine = by_length[self.rank :: self.world_size]  # every rank gets every length
        return blocks[mine], rows[mine]

    def _batch(self, blocks: np.ndarray, rows: np.ndarray, consumed: int) -> Batch:
        ids, lengths, weights = self.reader.gather(blocks, rows)
        wanted = self.pad_to or min(-(-ids.shape[1] // ROUND) * ROUND, self.reader.index.max_length)
        padding = ((0, 0), (0, wanted - ids.shape[1]))
        ids = np.pad(ids, padding, constant_values=self.reader.index.pad_id)
        return Batch(
            ids=torch.from_numpy(ids),
            lengths=torch.from_numpy(lengths),
            weights=torch.from_numpy(weights),
            sequence=torch.from_numpy(self.reader.first[blocks] + rows),
            source=torch.zeros(len(blocks), dtype=torch.int64),
            consumed=consumed,
        )
