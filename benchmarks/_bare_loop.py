"""The loop that `train.py` compares training with, one process of it; the launcher starts it.

    deepspeed benchmarks/_bare_loop.py (bare|parts) LENGTHS STEPS CONFIG [section.key=value ...]

`bare` trains on random batches that are in memory already and prints `step N` like a run;
`parts` takes turns with what a run does besides, one thing more each, and prints JSON.

Shapes: B sequences, T tokens, D latent size.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # `shards` is the package, not the script
from shards import Batch, Dataset
from t5vae.cluster.agreement import all_sum
from t5vae.cluster.process_group import start_process_group
from t5vae.cluster.ranks import Ranks, find_ranks
from t5vae.config import Config, load_config
from t5vae.metrics.runlog import RunLog
from t5vae.model import Regularisers, row_keys
from t5vae.model.noise import NOISE, keyed_normal
from t5vae.objective import PendingMMD, start_gather
from t5vae.training.build import build_model
from t5vae.training.engine import backward, build_engine
from t5vae.training.job import Job, resolve
from t5vae.training.precision import settle
from t5vae.training.step import Found, Loss, real_tokens

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
        batches.append(Batch(ids_BT.to(device), lengths_B, torch.ones(rows), sequence_B, like, 0))
    return batches


def variants(engine: Any, job: Job, device: torch.device) -> dict[str, TakeStep]:
    """The bare loop's step, and with one thing more each of what a run's step has."""
    objective, seed = job.config.objective, job.config.run.seed
    mmd = objective.mmd.model_dump(include={"kernel", "prior", "estimator", "sigma"})
    loss = Loss(objective, seed, job.split, device)

    def bare(batch: Batch) -> None:
        engine.backward(engine(batch.ids, labels=batch.ids, mode="score").loss)
        engine.step()

    def with_mmd(batch: Batch, regularisers: Regularisers | None = None) -> None:
        gathers: list[PendingMMD] = []

        def start(z_BD: Tensor) -> None:
            gathers.append(start_gather(z_BD, equal_rows=True))

        output = engine(
            batch.ids, labels=batch.ids, mode="score", regularisers=regularisers, on_latent=start
        )
        statistic = gathers[0].finish(**mmd, implementation=objective.mmd.implementation)
        engine.backward(output.loss + objective.mmd.weight * statistic)
        engine.step()

    def with_noise(batch: Batch) -> None:
        keys_B = row_keys(seed, 0, batch.sequence.to(device))
        with_mmd(batch, Regularisers(keys_B, latent_noise=objective.latent_noise))

    def with_sums(batch: Batch) -> None:
        tokens, *_ = all_sum(real_tokens(batch), False, False, 0, False, device=device)
        loss.begin(0, tokens, objective.mmd.weight)
        backward(engine, loss(engine, batch, 0))
        engine.step()

    return {"bare": bare, "mmd": with_mmd, "noise": with_noise, "sums": with_sums}


def parts(config: Config, batch: Batch, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same things alone, forward and backward, on random codes."""
    objective = config.objective
    mmd = objective.mmd.model_dump(include={"kernel", "prior", "estimator", "sigma"})
    dtype = torch.bfloat16 if config.train.half else torch.float32
    z_BD = torch.randn(len(batch.ids), config.model.latent_size, dtype=dtype, device=device)
    z_BD.requires_grad_()

    def regulariser() -> None:
        pending = start_gather(z_BD, equal_rows=True)
        pending.finish(**mmd, implementation=objective.mmd.implementation).backward()

    def noise() -> None:
        keys_B = row_keys(config.run.seed, 0, batch.sequence.to(device))
        noise_BD = keyed_normal(keys_B, z_BD.shape[1], NOISE).to(dtype)
        (z_BD + objective.latent_noise * noise_BD).sum().backward()

    def sums() -> None:
        all_sum(real_tokens(batch), False, False, 0, False, device=device)
        all_sum(0.0, not z_BD.sum().isfinite(), device=device)

    return {"mmd": regulariser, "noise": noise, "sums": sums}


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def train(
    take_step: TakeStep,
    batches: Iterator[Batch],
    steps: int,
    config: Config,
    say: Callable[[str], None],
    device: torch.device,
) -> None:
    for step in range(1, steps + 1):
        take_step(next(batches))
        if step == 1 or step % config.log.every == 0:
            wait(device)
            say(f"step {step}")


def take_turns(
    steps: dict[str, TakeStep], batches: Iterator[Batch], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """The seconds a step of each variant, one figure a round; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(BLOCK):
                steps[name](next(batches))
            wait(device)
            if number:
                found[name].append((time.perf_counter() - begin) / BLOCK)
    return found


def mean_seconds(run: Callable[[], object], device: torch.device) -> float:
    """All ranks together, after a first time."""
    run()
    dist.barrier()
    wait(device)
    begin = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait(device)
    return (time.perf_counter() - begin) / REPEATS


def line_of_log(job: Job, device: torch.device) -> Callable[[], object]:
    """Write a line of metrics.jsonl with its diagnostics, and show the gist of it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(job.config, enabled=job.ranks.is_first)
    loss = Loss(job.config.objective, job.config.run.seed, job.split, device)
    loss.begin(0, 1.0, 0.0)
    codes_BD = torch.randn(job.split.micro, job.settings.latent_size, device=device)
    loss.found.append(Found(0.0, 0.0, 0.0, codes_BD))
    figures = {f"figure_{number}": 0.1234567890123 for number in range(12)}

    def write() -> None:
        log.metrics({"step": 0, "loss": 1.0, **figures, **loss.latent_diagnostics()})

    return write


def main(mode: str, lengths: str, steps: str, path: str, *settings: str) -> None:
    ranks = find_ranks(dict(os.environ))
    job = resolve(load_config(path, settings), ranks)

    def say(text: str) -> None:
        if ranks.is_first:
            print(text, flush=True)

    say(f"created {psutil.Process().create_time()}")
    say("imported")
    device = start_process_group(ranks, compiles=job.config.model.compile)
    config, _ = settle(job.config, job.settings, job.split, device, {})
    job, half = replace(job, config=config), config.train.half
    # Not `start.build`, whose imports a bare loop has no use for.
    model = build_model(job.settings, config.model, seed=config.run.seed, half=half, device=device)
    engine = build_engine(model, job.deepspeed, config.optim)
    batches = random_batches(Path(lengths), ranks, job.dataset, device)
    say("built")
    take_step = variants(engine, job, device)
    if mode == "bare":
        train(take_step["bare"], cycle(batches), int(steps), config, say, device)
    else:
        found = take_turns(take_step, cycle(batches), int(steps), device)
        alone = {"line": line_of_log(job, device), **parts(config, batches[0], device)}
        seconds = {name: mean_seconds(part, device) for name, part in alone.items()}
        say(json.dumps({"block": BLOCK, "turns": found, "alone": seconds}))
    dist.destroy_process_group()


if __name__ == "__main__":
    # the launcher puts --local_rank=N first; the environment says the same
    main(*(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")))
