"""The stream of batches: what a rank trains on, exactly, from any position, for ever."""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np

from shards.read.dataset import Dataset, Mixing, Sources, open_dataset
from shards.read.dealer import Batch, Dealer, Plan
from shards.read.orders import NEWEST, ORDERS
from shards.read.windows import Windows
from t5vae.common.errors import UserError

LEAVE = 1.0  # seconds for the thread to end; one that waits for storage is left to itself


class ShardStream:
    """Batches of a dataset in an order that only the seed and the position determine.

    Every rank asks for the same global batches and takes its own share of each, so that any world
    size that divides the global batch sees the same sequences, and a run resumes from one integer.

    Args:
        data: a dataset folder or URL; a list of them, or of {"path": ..., "weight": ...}, for a
            mixture; or an open dataset.
        split: the split's name.
        seed: of the order.
        global_batch_size: G, sequences in one step over all ranks.
        rank, world_size: this process among all.
        micro_batch_size: rows of one batch; G / world_size by default.
        consumed: the global position to start from.
        on_corrupt: "error" raises at a damaged block; "skip" puts rows of one end token and
            weight 0 in its rows' places, counted by `quarantined`.
        sort_by_length: deal a rank's share of each global batch to its micro batches by length, so
            that they need less padding: each holds a band of lengths.
        pad_to: a fixed T; by default each batch's longest, rounded up to 8 within max_length.
        pin_memory: whether batches lie in page-locked memory, for an accelerator.
        order_version: of the order, see `shards.read.orders`.

    Attributes:
        consumed: the position.
        quarantined: rows of weight 0 in the global batches that it has dealt, or, at `world_size`
            ranks, in its own shares of them; with those of the state that was loaded.

    Raises:
        UserError: no such dataset, split or order, or sizes that do not divide.
        StorageError: the storage failed for minutes; so does asking for a batch.
    """

    def __init__(
        self,
        data: Sources | Dataset,
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
        pin_memory: bool = False,
        order_version: int = NEWEST,
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
        dataset = data if isinstance(data, Dataset) else open_dataset(data)
        if pad_to is not None and pad_to < dataset.max_length:
            raise UserError(
                f"pad_to {pad_to} is shorter than the longest sequences of {dataset.path} "
                f"({dataset.max_length} tokens)"
            )
        self.dataset = dataset
        self.split = split
        self.seed = seed
        self.consumed = consumed
        self.order_version = order_version
        self._stands_in = on_corrupt == "skip"
        self._dealer = Dealer(
            self._sources(),
            Mixing(dataset.quotas),
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            sort_by_length=sort_by_length,
            pad_to=pad_to,
            pin_memory=pin_memory,
        )
        self.quarantined = 0
        self._of_step = 0  # rows of weight 0 in the step that is being dealt
        self._batches: Iterator[Batch] | None = None
        self._thread: threading.Thread | None = None
        self._stop = lambda: None

    def _sources(self) -> list[Windows]:
        if self.order_version not in [*ORDERS]:
            known = " and ".join(map(str, ORDERS))
            raise UserError(f"an order of version {self.order_version} is not known, but {known}")
        order = ORDERS[self.order_version]
        readers = [index.reader(self.split) for index in self.dataset.indexes]
        return [
            Windows(index, reader, order(reader, self.seed), self._stands_in)
            for index, reader in zip(self.dataset.indexes, readers, strict=True)
        ]

    def bytes_read(self, steps: int) -> int:
        """Bytes of the blocks that this rank needs for some steps.

        Each window that a step touches is read once, as a whole; nothing is read to find out.
        """
        dealer = self._dealer
        opened = dealer.windows(self.consumed, steps)
        return sum(map(Windows.bytes_of, dealer.sources, opened))

    @property
    def period(self) -> int:
        """Positions in which each lane of the first dataset visits a block; an epoch's, where all
        are one window."""
        order = self._dealer.sources[0].order
        return order.lanes * order.rows_per_block if order.groups else order.sequences

    @property
    def epochs(self) -> dict[str, float]:
        """How often each dataset has been gone through, by its path."""
        taken = self._dealer.mixing.taken(np.array([self.consumed]))[0].tolist()
        sizes = (source.order.sequences for source in self._dealer.sources)
        passes = (count / size for count, size in zip(taken, sizes, strict=True))
        return dict(zip((index.path for index in self.dataset.indexes), passes, strict=True))

    def __iter__(self) -> "ShardStream":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except Exception:
            self.close()
            raise
        self._of_step += int((batch.weights == 0).sum())
        if batch.consumed > self.consumed:
            self.quarantined += self._of_step
            self.consumed, self._of_step = batch.consumed, 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and what was quarantined before it."""
        return {
            "order_version": self.order_version,
            "index_sha256": self.dataset.sha256,
            "seed": self.seed,
            "consumed": self.consumed,
            "quarantined": self.quarantined,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: the state belongs to another dataset or seed, or an order that is not known.
        """
        here = {"index_sha256": self.dataset.sha256, "seed": self.seed}
        for name, value in here.items():
            if state.get(name) != value:
                raise UserError(
                    f"cannot resume: the saved {name} is {state.get(name)}, but "
                    f"{self.dataset.path} gives {value}"
                )
        self.close()
        if state.get("order_version") != self.order_version:
            self.order_version = state.get("order_version", 0)
            self._dealer = replace(self._dealer, sources=self._sources())
        self.consumed = state["consumed"]
        self.quarantined = state.get("quarantined", 0)  # version 0.1 does not tell

    def close(self) -> None:
        """End the thread. Another batch asked for starts it again at `consumed`."""
        self._stop()
        self._batches, self._of_step = None, 0

    def __enter__(self) -> "ShardStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Iterator[Batch]:
        if self._thread is not None and self._thread.is_alive():  # it goes on in its dealer
            self._dealer = self._dealer.afresh()
        plans: SimpleQueue[Plan | Exception] = SimpleQueue()
        permits: SimpleQueue[bool] = SimpleQueue()
        self._thread = thread = threading.Thread(
            target=_plan_ahead,
            args=(self._dealer, self.consumed, plans, permits),
            name="shards-prefetch",
            daemon=True,
        )

        def end() -> None:
            permits.put(False)
            if thread is not threading.current_thread():  # where garbage is collected is chance
                thread.join(LEAVE)

        self._stop = weakref.finalize(self, end)  # also when the stream is merely dropped
        thread.start()
        return _batches(self._dealer, plans, permits)


def _plan_ahead(
    dealer: Dealer,
    consumed: int,
    plans: "SimpleQueue[Plan | Exception]",
    permits: "SimpleQueue[bool]",
) -> None:
    """The thread: it knows the dealer but not the stream, so that a dropped stream can end it.

    It reads, checks and shuffles blocks for the next plan while the last one is dealt.
    """
    try:
        for plan in dealer.plans(consumed):
            plans.put(plan)
            if not permits.get():
                return
    except Exception as error:
        plans.put(error)


def _batches(
    dealer: Dealer, plans: "SimpleQueue[Plan | Exception]", permits: "SimpleQueue[bool]"
) -> Iterator[Batch]:
    while True:
        plan = plans.get()
        if isinstance(plan, Exception):
            raise plan
        permits.put(True)
        yield from dealer.batches(plan)
