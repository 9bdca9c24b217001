"""A step's batches, and what all ranks agree on before it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shards import Batch, ShardStream
from t5vae.cluster.agreement import all_sum, gather_objects, raise_together
from t5vae.cluster.phases import phase
from t5vae.common.errors import StorageError, UserError
from t5vae.config import BatchSplit
from t5vae.training.job import Job
from t5vae.training.meter import work_of
from t5vae.training.step import real_tokens


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step before it.

    Attributes:
        tokens: real tokens of the global batch.
        flops: operations that its training takes.
        stop: whether any rank was told to stop.
        written: whether all ranks have written the checkpoint that was started.
        counting: bool [W, B] for each micro batch, which rows of all ranks count; None where all
            do, as in a step without damaged ones.
        sums: of the shares that ranks told besides.
    """

    tokens: float
    flops: float
    stop: bool
    written: bool
    counting: list[np.ndarray] | None
    sums: list[float]


def open_feed(job: Job, device: torch.device) -> "Feed":
    """This rank's share of a run's data, from the beginning."""
    data = job.config.data
    stream = ShardStream(
        job.dataset,
        seed=job.config.run.seed,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        on_corrupt=data.on_corrupt,
        sort_by_length=data.sort_by_length,
        pad_to=None if job.config.model.mask_padding else job.dataset.max_length,
        pin_memory=device.type == "cuda",
    )
    return Feed(stream, job.split, work_of(job.settings), device)


class Feed:
    """This rank's share of the data, a step's micro batches at a time.

    Args:
        stream: of this rank.
        split: how the global batch is dealt.
        work: counts the operations of a batch.
        device: this rank's.

    Attributes:
        position: of the stream before the batches that were read last.
        waited: seconds for them.
        quarantined: rows that stood in for damaged ones, of all ranks, in the steps agreed on.
    """

    def __init__(
        self,
        stream: ShardStream,
        split: BatchSplit,
        work: Callable[[Batch], float],
        device: torch.device,
    ):
        self.stream, self.split, self.work, self.device = stream, split, work, device
        self.copies = None if device.type == "cpu" else torch.Stream(device)
        self.counts: list[np.ndarray] = []
        self.position, self.waited = stream.consumed, 0.0
        self.problem: UserError | StorageError | None = None
        self.quarantined = 0

    def read(self) -> list[Batch]:
        """The next step's, on their way to the device while it is still at work on others.

        None where they cannot be read, which `agree` raises on all ranks.
        """
        began, self.position = time.perf_counter(), self.stream.consumed
        batches: list[Batch] = []
        with phase("data"):
            try:
                batches = [next(self.stream) for _ in range(self.split.accumulation)]
            except (UserError, StorageError) as error:
                self.problem = error
        self.waited = time.perf_counter() - began
        self.counts = [batch.weights.numpy() > 0 for batch in batches]
        return self._sent(batches)

    def _sent(self, batches: list[Batch]) -> list[Batch]:
        """Batches on the device, copied beside what it computes."""
        if self.copies is None:
            return batches
        present = torch.accelerator.current_stream(self.device)
        with self.copies:
            sent = [batch.to(self.device) for batch in batches]
        present.wait_stream(self.copies)
        for batch in sent:
            batch.used_by(present)
        return sent

    def agree(
        self,
        batches: list[Batch],
        *,
        stop: bool = False,
        written: bool = False,
        shares: Sequence[float] = (),
    ) -> Agreed:
        """Tell the other ranks, and hear from them; all of them call it together.

        Args:
            batches: that this rank has read.
            stop: whether it was told to stop.
            written: whether it has written its file of the checkpoint that was started.
            shares: of sums over the ranks, for whoever wants them.

        Raises:
            SharedError, SharedStorageError: where any rank could not read.
        """
        tokens, flops, stops, unread, left_out, written_by, *sums = all_sum(
            sum(map(real_tokens, batches)),
            sum(map(self.work, batches)),
            stop,
            self.problem is not None,
            sum(counts_B.size - counts_B.sum() for counts_B in self.counts),
            written,
            *shares,
        )
        if unread:
            raise_together(self.problem)
        self.quarantined += int(left_out)
        counting = self._counting() if left_out else None
        return Agreed(tokens, flops, stops > 0, written_by == self.split.ranks, counting, sums)

    def _counting(self) -> list[np.ndarray]:
        """Ask all ranks which of their rows count."""
        everyone = gather_objects(self.counts)
        return [np.stack(of_ranks) for of_ranks in zip(*everyone, strict=True)]

    @property
    def order_version(self) -> int:
        """Of the order in which the data comes."""
        return self.stream.order_version

    def figures(self) -> dict[str, float]:
        """How far it is, how often it went through the data, and what was left out as damaged."""
        stream = self.stream
        passes = {"epoch": stream.consumed / stream.dataset.sequences("train")}
        if len(stream.epochs) > 1:
            passes |= {f"epoch/{path}": n for path, n in stream.epochs.items()}
        return {
            "position": self.position,
            "consumed": stream.consumed,
            **passes,
            "quarantined": self.quarantined,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where it is, and what was quarantined so far."""
        return self.stream.state_dict() | {"quarantined": self.quarantined}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where it was.

        Raises:
            UserError: the state belongs to another order: another dataset or seed.
        """
        self.stream.load_state_dict(state)
        self.quarantined = self.stream.quarantined

    def close(self) -> None:
        self.stream.close()
