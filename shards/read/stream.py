"""The stream of batches: what a rank trains on, exactly, from any position, for ever."""

import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np

from shards.read.dataset import Dataset, Mixing, Sources, open_dataset
from shards.read.dealer import Batch, Dealer, Plan
from shards.read.order import ORDER_VERSION, Order
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
        sort_by_length: deal each global batch by length, so that ranks and micro batches need less
            padding. Which sequences a global batch holds does not change; but every rank reads
            every block, and each micro batch holds a band of lengths.
        pad_to: a fixed T; by default each batch's longest, rounded up to 8 within max_length.
        pin_memory: whether batches lie in page-locked memory, for an accelerator.

    Attributes:
        consumed: the position.
        quarantined: rows of weight 0 in the global batches that it has dealt, or, at `world_size`
            ranks, in its own shares of them; with those of the state that was loaded.

    Raises:
        UserError: no such dataset or split, or sizes that do not divide.
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
        readers = [index.reader(split) for index in dataset.indexes]
        self.dataset = dataset
        self.seed = seed
        self.consumed = consumed
        self._dealer = Dealer(
            [
                Windows(index, reader, Order(reader.table["sequences"], seed), on_corrupt == "skip")
                for index, reader in zip(dataset.indexes, readers, strict=True)
            ],
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

    def bytes_read(self, steps: int) -> tuple[int, int]:
        """Bytes of the blocks that this rank, and that all ranks together, need for some steps.

        Each window that a step touches is read once, as a whole; nothing is read to find out.
        """
        dealer = self._dealer
        own, every = (
            sum(
                source.bytes_of(names)
                for source, names in zip(
                    dealer.sources, dealer.windows(self.consumed, steps, of_all=of_all), strict=True
                )
            )
            for of_all in (False, True)
        )
        return own, every

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
        order = self._dealer.sources[0].order
        return {
            "order_version": ORDER_VERSION,
            "index_sha256": self.dataset.sha256,
            "seed": self.seed,
            "lanes": order.lanes,
            "window": order.window,
            "chunk": order.chunk,
            "consumed": self.consumed,
            "quarantined": self.quarantined,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: the state belongs to another order: another dataset or seed.
        """
        for name, here in self.state_dict().items():
            if name not in ("consumed", "quarantined") and state.get(name) != here:
                raise UserError(
                    f"cannot resume: the saved {name} is {state.get(name)}, but "
                    f"{self.dataset.path} gives {here}"
                )
        self.close()
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
