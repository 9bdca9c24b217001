"""Many real runs in the time of a few: `python _many_runs.py FOLDER` starts ranks again and again.

`FOLDER/launches.json` lists launches, {"world": ranks, "runs": [...]}, each of new processes, in
which its runs (as `Run`) follow each other. `FOLDER/RUN.RANK.json` is what a rank saw (as `Seen`).
"""

import contextlib
import gc
import hashlib
import io
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed  # noqa: F401 (here, so that the ranks that are forked need not)
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from shards import Batch, ShardStream
from t5vae.checkpoint.fragments import fragments
from t5vae.cluster.process_group import free_port
from t5vae.cluster.ranks import Ranks
from t5vae.cluster.stopping import StopRequest
from t5vae.cluster.together import Together
from t5vae.common.errors import UserError
from t5vae.config import Config, load_config
from t5vae.training import loop, start
from t5vae.training.step import Loss


@dataclass
class Run:
    """A start of a run.

    Attributes:
        name: of what is left of it; the same run started again needs another.
        settings: in place of those of `FOLDER/base.yaml`, as `load_config` takes them.
        stop_at: the step at which it is told to stop; 0 for none.
        poison: what is not finite, in one micro batch of one rank: (what, rank, micro batch) by
            step. "nan" or "inf" is the loss, "latent" the code, "gradient" that of one weight.
    """

    name: str
    settings: list[str]
    stop_at: int = 0
    poison: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@dataclass
class Seen:
    """What one rank saw of a run.

    Attributes:
        error: the UserError that ended it.
        output: what it said.
        sequences: of its batches, by step.
        moments: a hash of those of this rank, and of its fp32 weights, before each step.
        weights: of those it computes with, or its share of them at ZeRO-3.
    """

    error: str | None = None
    output: str = ""
    sequences: dict[int, list[int]] = field(default_factory=dict)
    moments: dict[int, str] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)


def seen_of(run: Run, config: Config, ranks: Ranks) -> Seen:
    """Run `loop.run`, and look at every step."""
    found, stop, output = Seen(), StopRequest(), io.StringIO()
    batch = config.data.global_batch_size
    following, loss_of, backward = ShardStream.__next__, Loss.__call__, loop.backward
    poison = contextlib.ExitStack()

    def next_batch(stream: ShardStream) -> Batch:
        step = stream.consumed // batch + 1
        stop.told = stop.told or step == run.stop_at
        read = following(stream)
        found.sequences.setdefault(step, []).extend(read.sequence.tolist())
        return read

    def look_and_lose(self: Loss, engine: Any, rows: Batch, micro: int) -> Tensor:
        step = self.position // batch + 1
        if not micro:
            found.moments[step] = digest(fragments(engine))
            found.weights[step] = digest(
                {
                    name: getattr(weight, "ds_tensor", weight).data
                    for name, weight in engine.module.named_parameters()
                }
            )
        kind, *where = run.poison.get(str(step), [""])
        if where == [ranks.rank, micro]:
            poison.enter_context(poisoned(engine.module, kind))
        return loss_of(self, engine, rows, micro)

    def go_back(engine: Any, loss: Tensor) -> None:
        with poison:
            backward(engine, loss)

    with (
        patch.object(ShardStream, "__next__", next_batch),
        patch.object(Loss, "__call__", look_and_lose),
        patch.object(loop, "backward", go_back),
        contextlib.redirect_stderr(output),
    ):
        try:
            loop.run(config, Together(ranks, config.run_dir, 60), stop)  # which have not met
        except UserError as error:
            found.error = str(error)
    found.output = output.getvalue()
    return found


@contextlib.contextmanager
def poisoned(model: torch.nn.Module, kind: str) -> Any:
    """Make something not finite in the next micro step."""

    def after_forward(module: Any, arguments: Any, output: Any) -> None:
        output.loss = output.loss * math.nan if kind == "nan" else output.loss + math.inf

    to_latent = model.bottleneck.to_latent
    if kind == "latent":
        hook = to_latent.register_forward_hook(lambda module, arguments, z_BD: z_BD * math.nan)
    elif kind == "gradient":
        hook = to_latent.bias.register_hook(lambda gradient: gradient * math.nan)
    else:
        hook = model.register_forward_hook(after_forward)
    yield
    hook.remove()


def digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def rank_main(rank: int, world: int, port: int, folder: Path, runs: list[dict]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, rank, world, "127.0.0.1", port)
    start_process_group = start.start_process_group

    def start_once(*arguments: Any, **options: Any) -> torch.device:
        if dist.is_initialized():
            return torch.device("cpu")
        return start_process_group(*arguments, **options)

    with (
        patch.object(start, "start_process_group", start_once),
        patch.object(dist, "destroy_process_group", lambda: None),
        patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True),
    ):
        for run in (Run(**given) for given in runs):
            found = seen_of(run, load_config(folder / "base.yaml", run.settings), ranks)
            (folder / f"{run.name}.{rank}.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    gc.freeze()  # else ranks spend much of their time looking through what was imported
    for launched in json.loads((folder / "launches.json").read_text()):
        world = launched["world"]
        arguments = (world, free_port(), folder, launched["runs"])
        try:
            start_processes(rank_main, arguments, nprocs=world, start_method="fork")
        except ProcessException as error:
            sys.exit(f"{world} ranks: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
