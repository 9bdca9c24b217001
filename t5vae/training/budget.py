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
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from shards import Dataset, ShardStream
from t5vae.checkpoint.saving import Saver
from t5vae.cluster.agreement import all_max, all_sum, from_first, raise_together
from t5vae.common.errors import UserError
from t5vae.common.progress import process_seconds
from t5vae.config import Config, Train, load_config
from t5vae.training import setup
from t5vae.training.build import fetch, open_stream
from t5vae.training.engine import set_learning_rate
from t5vae.training.midrun import Probe
from t5vae.training.step import Step, micro_step, real_tokens

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


def with_steps_before(config: Config) -> Config:
    """The configuration with the steps of the run that it goes on with, where it has minutes.

    Other minutes than those of that run are as many more steps, or fewer. A run that began with a
    fixed number of steps keeps that, and has no minutes.
    """
    minutes, before = config.train.minutes, _before(config)
    if minutes is None or before is None:
        return config
    if before.minutes is None:
        return _with(config, steps=before.steps, minutes=None)
    return _with(config, steps=max(1, round(before.steps * minutes / before.minutes)))


def _before(config: Config) -> Train | None:
    """What was set for the run that this one goes on with, if it does."""
    if setup.manifest_before(config) is None:
        return None
    try:
        return load_config(config.run_dir / "config.yaml").train
    except UserError:
        return None


def fix_steps(
    config: Config, dataset: Dataset, device: torch.device, build: Callable[[], Any]
) -> tuple[Config, list[str]]:
    """Set `train.steps` to what `train.minutes` has room for; all ranks call it, and find the same.

    Args:
        config: the run's, as `with_steps_before` has it.
        dataset: its shards.
        device: this rank's.
        build: makes an engine as the run's.

    Returns:
        The configuration, and a line that says why, where a trial was needed.

    Raises:
        UserError: where the data cannot be read.
    """
    config = from_first(config)
    minutes = config.train.minutes
    if minutes is None or from_first(_before(config) is not None):
        return config, []
    pace = _trial(config, dataset, device, build)
    _forget(config, device)
    spent = from_first(process_seconds())
    steps = pace.steps_in(minutes * 60 - spent, config)
    parts = [f"{spent:.0f} s are spent", f"a step takes {pace.step:.3g} s"]
    if config.eval.every:
        parts.append(f"an evaluation {pace.evaluation:.1f} s")
    parts.append(f"a save {pace.save:.1f} s")
    return _with(config, steps=steps), [f"{minutes:g} minutes: {steps:,} steps; {', '.join(parts)}"]


def _with(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _trial(
    config: Config, dataset: Dataset, device: torch.device, build: Callable[[], Any]
) -> Pace:
    began = time.perf_counter()
    engine = build()
    set_learning_rate(engine, 0.0)  # what is learned would be lost: nothing may go wrong either
    probe = Probe(engine, dataset, config) if config.eval.every else None
    stream = open_stream(config, dataset, dist.get_rank(), dist.get_world_size(), device)
    start = time.perf_counter() - began
    try:
        _step_seconds(engine, stream, config, device, most=WARM_UP)
        step = _step_seconds(engine, stream, config, device)
        evaluation = probe.look().figures["eval/seconds"] if probe else 0.0
        save = _save_seconds(engine, config)
    finally:
        stream.close()
        take_apart(engine)
    return Pace(*all_max(start, step, evaluation, save, device=device))


def _step_seconds(
    engine: Any, stream: ShardStream, config: Config, device: torch.device, most: float = math.inf
) -> float:
    """Of a step on average, of as many as there is time for; all ranks take the same number."""
    world = dist.get_world_size()
    accumulation = config.accumulation(world)
    began, passed, steps = time.perf_counter(), 0.0, 0
    while passed < SECONDS and steps < most:
        position = stream.consumed
        batches, problem = fetch(stream, accumulation)
        tokens, unread = all_sum(sum(map(real_tokens, batches)), problem is not None, device=device)
        if unread:
            raise_together(problem)
        shared = Step(1, position, tokens, config.objective.mmd.weight, world * accumulation)
        for micro, batch in enumerate(batches):
            micro_step(engine, batch, micro, shared, config, device)
            engine.step()
        steps += 1
        (passed,) = all_max(time.perf_counter() - began, device=device)
    return passed / steps


def _save_seconds(engine: Any, config: Config) -> float:
    """Of a checkpoint, which is deleted; 0 where it cannot be saved, which the run will tell."""
    folder = config.run_dir / "trial"
    saver = Saver(folder, asynchronous=False)
    seconds = 0.0
    with contextlib.suppress(OSError):
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


def _forget(config: Config, device: torch.device) -> None:
    """Give back the trial's memory, and forget what torch learned of its shapes."""
    if config.model.compile:
        torch.compiler.reset()
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
