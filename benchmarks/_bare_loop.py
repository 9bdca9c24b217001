"""The loop that `train.py` compares training with, one process of it; the launcher starts it.

    deepspeed benchmarks/_bare_loop.py (bare|parts) STEPS LENGTHS CONFIG [section.key=value ...]

`bare` trains on random batches that are in memory already and prints `step N` like a run;
`parts` takes turns with what a run does besides, one thing more each, and prints JSON.

Shapes: B sequences, T tokens, D latent size.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import _objective
import _step
import torch
import torch.distributed as dist
from _timing import seconds, take_turns, wait
from torch import Tensor

from shards import Batch, Dataset
from t5vae.cluster.process_group import start_process_group
from t5vae.cluster.ranks import Ranks, find_ranks
from t5vae.config import load_config
from t5vae.metrics.runlog import RunLog
from t5vae.model import Regularisers
from t5vae.training.job import Job, resolve
from t5vae.training.outcome import Outcomes
from t5vae.training.precision import settle
from t5vae.training.start import build

BLOCK = 2
"""Steps of one variant before the next has its turn."""
REPEATS = 50
"""Of what is timed alone, and of lines that are logged."""

TakeStep = Callable[[Batch], None]


def random_batches(file: Path, ranks: Ranks, dataset: Dataset, device: torch.device) -> list[Batch]:
    """Random ids in the shapes and with the lengths of this rank's real batches."""
    draw = torch.Generator().manual_seed(ranks.rank)
    batches = []
    for real in json.loads(file.read_text())[ranks.rank]:
        lengths_B, T = torch.tensor(real["lengths"]), real["T"]
        rows = len(lengths_B)
        ids_BT = torch.randint(3, dataset.vocab_size, (rows, T), generator=draw)
        ids_BT[torch.arange(T) >= lengths_B[:, None]] = dataset.pad_id
        ids_BT[torch.arange(rows), lengths_B - 1] = dataset.eos_id
        sequence_B = torch.arange(rows) + rows * ranks.rank
        like = torch.zeros_like(sequence_B)
        batch = Batch.of(ids_BT, lengths_B, torch.ones(rows), sequence_B, like)
        batches.append(batch.to(device))
    return batches


def variants(engine: Any, job: Job, device: torch.device) -> dict[str, TakeStep]:
    """The bare loop's step, and with one thing more each of what a run's step has."""
    config, loss = job.config, _step.loss_of(job.config, job.ranks.world_size, device)

    def bare(batch: Batch) -> None:
        output = engine(batch.ids, labels=batch.ids, places=batch.places, mode="score")
        engine.backward(output.loss)
        engine.step()

    def with_mmd(batch: Batch, regularisers: Regularisers | None = None) -> None:
        gathers = []

        def start(z_BD: Tensor) -> None:
            gathers.append(_objective.gather(z_BD))

        output = engine(
            batch.ids,
            labels=batch.ids,
            places=batch.places,
            mode="score",
            regularisers=regularisers,
            on_latent=start,
        )
        statistic = _objective.statistic(gathers[0], config)
        engine.backward(output.loss + config.objective.mmd.weight * statistic)
        engine.step()

    def with_noise(batch: Batch) -> None:
        with_mmd(batch, _step.noise_of(batch, config, device))

    outcomes = Outcomes(loss.shares)

    def with_sums(batch: Batch) -> None:
        outcome = _step.take_step(loss, engine, batch, outcomes)
        for past in outcomes.after(outcome, wait=False):
            past.figures()

    return {"bare": bare, "mmd": with_mmd, "noise": with_noise, "sums": with_sums}


def parts(job: Job, batch: Batch, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same things alone, forward and backward, on random codes."""
    config = job.config
    dtype = torch.bfloat16 if config.train.half else torch.float32
    z_BD = torch.randn(len(batch.ids), config.model.latent_size, dtype=dtype, device=device)
    z_BD.requires_grad_()

    sums = _step.Sums(job, device)
    return {
        "mmd": lambda: _objective.statistic(_objective.gather(z_BD), config).backward(),
        "noise": lambda: _step.with_noise(z_BD, batch, config).sum().backward(),
        "sums": lambda: sums.exchange(batch),
        "line": line_of_log(job, device),
    }


def line_of_log(job: Job, device: torch.device) -> Callable[[], object]:
    """Write a line of metrics.jsonl with its diagnostics, and show the gist of it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(job.config, enabled=job.ranks.is_first)
    outcome = _step.Sums(job, device).outcome()
    figures = {f"figure_{number}": 0.1234567890123 for number in range(12)}

    def write() -> None:
        log.metrics({"step": 0, "loss": 1.0, **figures, **outcome.latent_diagnostics()})

    return write


def timed(step: TakeStep, batches: Iterator[Batch], device: torch.device) -> Callable[[], float]:
    """Seconds a step of `BLOCK` of them, which all ranks begin together."""

    def block() -> None:
        for _ in range(BLOCK):
            step(next(batches))

    def run() -> float:
        dist.barrier()
        return seconds(block, device=device) / BLOCK

    return run


def mean_seconds(run: Callable[[], object], device: torch.device) -> float:
    """All ranks together, after a first time."""

    def repeat() -> None:
        for _ in range(REPEATS):
            run()

    run()
    dist.barrier()
    return seconds(repeat, device=device) / REPEATS


class Started(NamedTuple):
    """What a loop works with."""

    job: Job
    engine: Any
    device: torch.device
    batches: list[Batch]


def start(lengths: str, path: str, *settings: str) -> Started:
    """A run's engine on this rank, and batches for it."""
    ranks = find_ranks(dict(os.environ))
    job = resolve(load_config(path, settings), ranks)
    device = start_process_group(ranks, compiles=job.config.model.compile)
    config, _ = settle(job.config, job.settings, job.split, device, {})
    job = replace(job, config=config)
    engine = build(job, device)
    batches = random_batches(Path(lengths), ranks, job.dataset, device)
    return Started(job, engine, device, batches)


def main(mode: str, steps: str, *arguments: str) -> None:
    job, engine, device, batches = start(*arguments)

    def say(text: str) -> None:
        if job.ranks.is_first:
            print(text, flush=True)

    take_step, stream = variants(engine, job, device), cycle(batches)
    if mode == "bare":
        for step in range(1, int(steps) + 1):
            take_step["bare"](next(stream))
            if step % job.config.log.every == 0:
                wait(device)
                say(f"step {step}")
    else:
        runs = {name: timed(step, stream, device) for name, step in take_step.items()}
        turns = take_turns(runs, int(steps))
        alone = parts(job, batches[0], device)
        means = {name: mean_seconds(part, device) for name, part in alone.items()}
        say(json.dumps({"block": BLOCK, "turns": turns, "alone": means}))
    dist.destroy_process_group()


def own_arguments() -> list[str]:
    """The launcher puts --local_rank=N first; the environment says the same."""
    return [each for each in sys.argv[1:] if not each.startswith("--local_rank")]


if __name__ == "__main__":
    main(*own_arguments())
