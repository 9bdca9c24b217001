"""How many steps a run of `train.minutes` has: fixed before its first one, by a trial of a few.

The trial takes real steps with an engine and a stream of its own, which are then thrown away. The
run begins from its seed after it, and is that of `train.steps` with the same number.
"""

import contextlib
import gc
import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from t5vae.checkpoint.saving import FAILURES, Saver
from t5vae.cluster.agreement import all_max, from_first
from t5vae.common.progress import process_seconds
from t5vae.config import Config
from t5vae.training.engine import backward, set_learning_rate, update
from t5vae.training.feed import Feed, open_feed
from t5vae.training.job import Job, train_before
from t5vae.training.midrun import MidRunEvaluation
from t5vae.training.step import Loss

WARM_UP = 3  # steps at most
SECONDS = 3.0  # of warm-up at most, and of steps that are timed


@dataclass(frozen=True)
class Pace:
    """What the parts of a run take on the slowest rank, in seconds.

    Attributes:
        start: until the first step.
        step: one of them, on average.
        evaluation, save: one of them.
    """

    start: float
    step: float
    evaluation: float
    save: float

    def whole(self, steps: int, config: Config) -> float:
        """What so many steps take, with their evaluations and saves."""
        saves, looks = config.checkpoint.every or steps, config.eval.every or steps
        saved = steps // saves + (steps % saves > 0)
        both = steps // math.lcm(saves, looks)
        evaluated = steps // looks + steps // saves - both
        evaluated += steps % looks > 0 and steps % saves > 0
        return self.start + steps * self.step + evaluated * self.evaluation + saved * self.save

    def steps_in(self, seconds: float, config: Config) -> int:
        """The most steps that take no longer, at least 1."""
        most = max(1, int(seconds / self.step))
        return max(
            1, bisect_right(range(1, most + 1), seconds, key=lambda n: self.whole(n, config))
        )


def fix_steps(
    job: Job, device: torch.device, build: Callable[[Job, torch.device], Any]
) -> tuple[Job, list[str]]:
    """Set `train.steps` to what `train.minutes` has room for; all ranks call it, and find the same.

    Args:
        job: with the steps of the run that it goes on with.
        device: this rank's.
        build: makes an engine as the run's.

    Returns:
        The job, and a line that says why, where a trial was needed.

    Raises:
        UserError: where the data cannot be read.
    """
    job = replace(job, config=from_first(lambda: job.config))
    config, minutes = job.config, job.config.train.minutes
    if minutes is None or from_first(lambda: train_before(config) is not None):
        return job, []
    pace = _trial(job, device, build)
    _forget(device, compiled=config.model.compile)
    spent = from_first(process_seconds)
    steps = pace.steps_in(minutes * 60 - spent, config)
    parts = [f"{spent:.0f} s are spent", f"a step takes {pace.step:.3g} s"]
    if config.eval.every:
        parts.append(f"an evaluation {pace.evaluation:.1f} s")
    parts.append(f"a save {pace.save:.1f} s")
    told = f"{minutes:g} minutes: {steps:,} steps; {', '.join(parts)}"
    return replace(job, config=config.with_("train", steps=steps)), [told]


def _trial(job: Job, device: torch.device, build: Callable[[Job, torch.device], Any]) -> Pace:
    began = time.perf_counter()
    config = job.config
    engine = build(job, device)
    set_learning_rate(engine, 0.0)  # what is learned would be lost: nothing may go wrong either
    evaluation = MidRunEvaluation(engine, job.dataset, config.eval)
    feed = open_feed(job, device)
    loss = Loss(config.objective, config.run.seed, job.split, device)
    start = time.perf_counter() - began
    try:
        _step_seconds(engine, feed, loss, most=WARM_UP)
        step = _step_seconds(engine, feed, loss)
        evaluated = evaluation.look().figures["eval/seconds"] if config.eval.every else 0.0
        save = _save_seconds(engine, job.folder / "trial")
    finally:
        feed.close()
        take_apart(engine)
    return Pace(*all_max(start, step, evaluated, save))


def _step_seconds(engine: Any, feed: Feed, loss: Loss, most: float = math.inf) -> float:
    """Of a step on average, of as many as there is time for; all ranks take the same number."""
    began, passed, steps = time.perf_counter(), 0.0, 0
    while passed < SECONDS and steps < most:
        batches = feed.read()
        agreed = feed.agree(batches)
        weights = loss.objective.weights(0, 1)
        loss.begin(feed.position, agreed.tokens, weights, agreed.counting)
        for micro, batch in enumerate(batches):
            backward(engine, loss(engine, batch, micro))
            update(engine)
        steps += 1
        (passed,) = all_max(time.perf_counter() - began)
    return passed / steps


def _save_seconds(engine: Any, folder: Path) -> float:
    """Of a checkpoint, which is deleted; 0 where it cannot be saved, which the run will tell."""
    saver = Saver(folder, asynchronous=False)
    seconds = 0.0
    with contextlib.suppress(*FAILURES):
        saver.start(engine, 0, {})
        seconds = saver.finish().seconds
    saver.close()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return seconds


def take_apart(engine: Any) -> None:
    """Part an engine from its weights: at stage 3 caches of DeepSpeed's keep layers for ever."""
    from deepspeed.runtime.zero import parameter_offload

    offload = getattr(engine.optimizer, "parameter_offload", None)
    coordinator = offload and offload.get_param_coordinator()
    engine.destroy()
    if coordinator:
        parameter_offload.FWD_MODULE_STACK.clear()
        vars(coordinator).clear()
        for layer in list(engine.module.modules()):
            vars(layer).clear()


def _forget(device: torch.device, *, compiled: bool) -> None:
    """Give back the trial's memory, and forget what torch learned of its shapes."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
