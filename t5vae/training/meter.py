"""The meter: how fast a run is, what it waits for, and how much memory it takes."""

import resource
import sys
import time
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

from shards import Batch
from t5vae.config import BatchSplit
from t5vae.model import T5VAEConfig, training_flops
from t5vae.training.step import real_tokens

P = ParamSpec("P")
R = TypeVar("R")
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "L4": 121e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
"""Dense products a second in bf16, by a part of the device's name, as the makers' sheets have
them; the first that is found counts. V100's is of fp16."""


def peak_flops(device: torch.device, *, half: bool) -> float | None:
    """Operations a second of matrix products in half precision; None where that is not known."""
    if device.type != "cuda" or not half:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on an accelerator, or this process in a host's memory."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work_of(config: T5VAEConfig) -> Callable[[Batch], float]:
    """What counts the operations of a batch, forward and backward, as `training_flops` does."""
    of_row = cache(lambda width: training_flops(config, 1, width, width, 0))
    of_token = training_flops(config, 0, 0, 0, 1)
    return lambda batch: len(batch.ids) * of_row(batch.ids.shape[1]) + of_token * real_tokens(batch)


class Meter:
    """Speed of the steps since the last reading.

    Args:
        device: this rank's.
        split: how the global batch is dealt.
        peak: operations a second of one device, for MFU; None where it is not known.
    """

    def __init__(self, device: torch.device, split: BatchSplit, peak: float | None):
        self.device = device
        self.split = split
        self.peaks = None if peak is None else peak * split.ranks
        self.last: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        self.began = time.perf_counter()
        self.waited = self.paused = 0.0
        self.steps = 0
        self.tokens = self.flops = 0.0

    def count(self, tokens: float, flops: float, waited: float) -> None:
        """One more step.

        Args:
            tokens, flops: what all ranks did in it.
            waited: seconds of it that went by without work: waiting for data.
        """
        self.steps += 1
        self.tokens += tokens
        self.waited += waited
        self.flops += flops

    def apart(self, work: Callable[P, R]) -> Callable[P, R]:
        """The same work, whose time is not that of steps: it lies between them."""

        @wraps(work)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            before = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.paused += time.perf_counter() - before

        return timed

    def read(self) -> dict[str, float]:
        """The figures, for metrics.jsonl; the meter begins anew, unless there was no step since.

        Returns:
            tokens_per_second, sequences_per_second: of all ranks; step_seconds: of one step;
            mfu: model FLOPs utilisation, see :mod:`t5vae.model.flops`, where the peak is known;
            data_wait: share of the time spent waiting for data; memory_bytes: the peak so far.
            Times and memory are this rank's.
        """
        if not self.steps:
            return self.last
        seconds = time.perf_counter() - self.began - self.paused
        figures = {
            "tokens_per_second": self.tokens / seconds,
            "sequences_per_second": self.steps * self.split.sequences / seconds,
            "step_seconds": seconds / self.steps,
            "data_wait": self.waited / seconds,
            "memory_bytes": peak_memory(self.device),
        }
        if self.peaks is not None:
            figures["mfu"] = self.flops / (seconds * self.peaks)
        self._begin()
        self.last = figures
        return figures
