"""The section of `gpu.py` about a training step of a T5-base: the whole loop beside the bare one.

Both run in this process, one after the other: whole is `t5vae.training.loop.run` itself.
"""

import gc
import gzip
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from _bare_loop import variants
from _gpu_worker import Bench, Part, tried
from _launches import QUICKSTART, T5_BASE, TOY
from _report import Target, figure, table
from _timing import wait

from shards import Batch
from t5vae.cluster.process_group import start_process_group
from t5vae.cluster.ranks import find_ranks
from t5vae.cluster.stopping import StopRequest
from t5vae.cluster.together import Together
from t5vae.config import Config, load_config
from t5vae.metrics.reading import read_metrics
from t5vae.training.budget import take_apart
from t5vae.training.feed import open_feed
from t5vae.training.job import Job, resolve
from t5vae.training.loop import run
from t5vae.training.start import build

ALONE = find_ranks({})
LOG_EVERY = 10
PROFILED = 5
"""Steps at the end of a whole loop, which are not timed."""
WARM_UP = 10
OF_BARE, MFU, WAITS = 0.97, 0.40, 0.03

STEP = """\
`configs/quickstart.yaml` with a T5-base, {rows} lines a step padded to at most {length} tokens, \
{precision}, ZeRO stage 1, `log.every={every}`, no evaluation or save but the last. Whole is the \
loop of `train.py`, by its own metrics; bare has the same engine on batches that are on the device \
already: forward, backward, optimiser; no data, MMD, noise, sums, schedule, log. Medians over \
windows of {every} steps, after {warm} steps. MFU counts operations as docs/model.md has them, \
pads included. The device waits where no kernel or copy runs: their time, by torch's profiler \
over {profiled} more steps of the whole loop, over that of as many steps without it.

"""


@dataclass(frozen=True)
class Way:
    """A way to train it."""

    title: str
    settings: tuple[str, ...]
    first: bool = False
    """It is what the targets are of."""


FUSED, PLAIN = "model.fused_cross_entropy=true", "model.fused_cross_entropy=false"
WAYS = (
    Way("Muon, fused cross-entropy", ("optim.name=muon", FUSED), first=True),
    Way("AdamW, fused cross-entropy", ("optim.name=adamw", FUSED)),
    Way("Muon, plain cross-entropy", ("optim.name=muon", PLAIN)),
    Way("Muon, fused cross-entropy, compiled", ("optim.name=muon", FUSED, "model.compile=true")),
    Way("AdamW, plain cross-entropy, compiled", ("optim.name=adamw", PLAIN, "model.compile=true")),
)


@dataclass(frozen=True)
class Found:
    """Of one way: seconds a step, shares (None where they cannot be had), and bytes at most."""

    whole: float
    bare: float
    mfu: float | None
    waits: float | None
    data_wait: float
    bytes: int


def step(bench: Bench) -> Iterator[Part]:
    """Each way, whole and bare."""
    # DeepSpeed keeps the groups of its first engine: one process group has to serve all runs.
    dist.destroy_process_group = lambda *_: None
    ways = WAYS[:1] if bench.smoke else WAYS
    found: dict[str, Found | str] = {}
    targets: list[Target] = []
    rows = 32 if bench.smoke else 512
    for way in ways:
        if bench.left < (0 if bench.smoke else 15):
            text = f"Not timed, since the time was over: {way.title} and what would follow.\n"
            yield Part("left out", text)
            break
        settings = way.settings
        if bench.smoke:
            settings = tuple(PLAIN if setting == FUSED else setting for setting in settings)
        config = step_config(bench, rows, settings)
        own = found[way.title] = tried(measure, config)
        if way.first and isinstance(own, Found):
            targets = list(targets_of(way.title, own))
        yield Part("table", page(config, found), tuple(targets))


def step_config(bench: Bench, rows: int, settings: tuple[str, ...]) -> Config:
    steps, precision = (2 * LOG_EVERY, "fp32") if bench.smoke else (60, "bf16")
    return load_config(
        QUICKSTART,
        [
            *(TOY if bench.smoke else T5_BASE),
            f"data.shards={bench.lines}",
            f"data.global_batch_size={rows}",
            f"run.output_dir={bench.scratch / 'run'}",
            *(f"log.every={LOG_EVERY}", "checkpoint.every=0", "eval.every=0"),
            *(f"train.precision={precision}", "optim.muon_precision=fp32"),
            *(f"train.steps={steps + PROFILED}", f"train.profile=[{steps + 1},{steps + PROFILED}]"),
            *settings,
        ],
    )


def measure(config: Config) -> Found:
    """The whole loop's metrics and trace, and the bare loop's clock."""
    device = start_process_group(ALONE, compiles=config.model.compile)
    folder = config.run_dir
    shutil.rmtree(folder, ignore_errors=True)
    before = release(device)
    run(config, Together(ALONE, config.run_dir, config.train.timeout), StopRequest())
    release(device)
    job, steps = resolve(config, ALONE), config.train.steps - PROFILED
    timed = [line for line in read_metrics(folder) if WARM_UP < line["step"] <= steps]
    whole = median(line["step_seconds"] for line in timed)
    busy = busy_seconds(folder / "profile" / "rank-00000.trace.json.gz") / PROFILED
    bare = bare_seconds(job, real_batches(job, device), steps, device)
    release(device)
    return Found(
        whole=whole,
        bare=bare,
        mfu=median(line["mfu"] for line in timed) if "mfu" in timed[0] else None,
        waits=max(0.0, 1 - busy / whole) if busy else None,
        data_wait=median(line["data_wait"] for line in timed),
        bytes=timed[-1]["memory_bytes"] - before,
    )


def release(device: torch.device) -> int:
    """Forget what is over; the bytes that the device still holds."""
    gc.collect()
    if device.type == "cpu":
        return 0
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    return torch.accelerator.memory_allocated(device)


def real_batches(job: Job, device: torch.device) -> list[Batch]:
    """A few, on the device."""
    with open_feed(job, device).stream as stream:
        found = [next(stream) for _ in range(8)]
    return [batch.to(device) for batch in found]


def bare_seconds(job: Job, batches: list[Batch], steps: int, device: torch.device) -> float:
    """Of a step of the bare loop, the median over windows of as many as the whole one logs."""
    engine = build(job, device)
    take_step = variants(engine, job, device)["bare"]
    stream, windows, began = cycle(batches), [], time.perf_counter()
    for number in range(1, steps + 1):
        take_step(next(stream))
        if number % LOG_EVERY == 0:
            wait(device)
            windows.append((time.perf_counter() - began) / LOG_EVERY)
            began = time.perf_counter()
    take_apart(engine)
    return median(windows[WARM_UP // LOG_EVERY :])


def busy_seconds(trace: Path) -> float:
    """In which the device did anything, by a profile's trace; 0 where it has no device."""
    with gzip.open(trace, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    busy, until = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6


def targets_of(title: str, found: Found) -> Iterator[Target]:
    yield Target(f"{title}: whole over bare loop", OF_BARE, found.bare / found.whole)
    if found.mfu is not None:
        yield Target(f"{title}: MFU", MFU, found.mfu)
    if found.waits is not None:
        yield Target(f"{title}: the device waits", WAITS, found.waits, at_most=True)


def page(config: Config, found: dict[str, Found | str]) -> str:
    text = STEP.format(
        rows=config.data.global_batch_size,
        precision=config.train.precision,
        length=config.data.open().max_length,
        every=LOG_EVERY,
        warm=WARM_UP,
        profiled=PROFILED,
    )
    rows = [
        (title, own)
        if isinstance(own, str)
        else (
            title,
            figure(1000 * own.whole),
            figure(1000 * own.bare),
            f"{own.bare / own.whole:.3f}",
            "" if own.mfu is None else f"{own.mfu:.1%}",
            "" if own.waits is None else f"{own.waits:.1%}",
            f"{own.data_wait:.1%}",
            figure(own.bytes / 2**30),
        )
        for title, own in found.items()
    ]
    header = ("", "whole, ms", "bare, ms", "whole over bare", "MFU", "the device waits")
    return text + table((*header, "waits for data", "GiB"), rows)
