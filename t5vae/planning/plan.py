"""`t5vae plan`: what a run will need before it starts: memory, communication, reads."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from shards import Dataset, ShardStream
from shards.read.order import LANES, WINDOW
from t5vae.common.errors import UserError
from t5vae.config import BatchSplit, Config
from t5vae.model import T5VAE
from t5vae.planning.activations import activations
from t5vae.planning.describe import open_if_there
from t5vae.planning.memory import Memory, Regime, Sizes, memory, regime_of, sizes_of
from t5vae.training.build import is_installed, model_config
from t5vae.training.precision import settle, settled

GIB = 2**30


@dataclass(frozen=True)
class Reads:
    """What one rank reads of the shards, in bytes; of the ranks looked at, the one with most.

    Attributes:
        per_step, per_epoch: on average.
        over_fair: over an equal share of the data.
    """

    per_step: float
    per_epoch: float
    over_fair: float


@dataclass(frozen=True)
class Plan:
    """What a run will need, of each rank.

    Attributes:
        parameters: of the model.
        length: tokens of the longest sequences, for which memory is planned.
        memory: with the configuration's own micro batch.
        sent: bytes that a rank sends in a step, by part, as rings send them.
        reads: None where the configuration names no shards that exist.
        gpu_memory: bytes that there are; None where that is not given.
        largest: the largest micro batch that fits in it, and the accumulation that follows; None
            where none does, or that is not asked.
    """

    world_size: int
    accelerated: bool
    parameters: int
    length: int
    micro_batch_size: int
    accumulation: int
    memory: Memory
    sent: dict[str, int]
    reads: Reads | None
    gpu_memory: float | None = None
    largest: tuple[int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.memory.peak, "fits": self.fits}

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where it is not known."""
        return None if self.gpu_memory is None else self.memory.peak <= self.gpu_memory


def plan(
    config: Config, *, nodes: int, gpus_per_node: int, gpu_memory: float | None = None
) -> Plan:
    """Plan a run; nothing is allocated, and of the shards the index alone is read.

    Args:
        config: the run's.
        nodes: hosts.
        gpus_per_node: 0 for one rank a host, on its CPU.
        gpu_memory: GiB of one rank's device; of a host's memory without devices.

    Raises:
        UserError: for what training would refuse of these, or memory that is not above 0.
    """
    if gpu_memory is not None and not gpu_memory > 0:
        raise UserError(f"--gpu-memory is {gpu_memory:g}: give the GiB of one device")
    world_size, accelerated = nodes * max(1, gpus_per_node), gpus_per_node > 0
    split = config.data.split(world_size)
    dataset = open_if_there(config)
    settings = model_config(config.model, config.objective, dataset)
    with torch.device("meta"):
        sizes = sizes_of(T5VAE(settings), config.optim.name)
    if accelerated:
        config = settled(config, "bf16")
    else:
        config, _ = settle(config, settings, split, torch.device("cpu"), {})
    fused = config.model.fused_cross_entropy
    kept = activations(
        settings,
        settings.sequence_length,
        torch.bfloat16 if config.train.half else torch.float32,
        checkpointing=config.model.gradient_checkpointing,
        fused_cross_entropy=accelerated
        and (is_installed("liger-kernel") if fused is None else fused),
    )

    def needed(split: BatchSplit) -> Memory:
        return memory(regime_of(config, split), sizes, kept, accelerated=accelerated)

    there = None if gpu_memory is None else gpu_memory * GIB
    return Plan(
        world_size=world_size,
        accelerated=accelerated,
        parameters=sizes.total,
        length=settings.sequence_length,
        micro_batch_size=split.micro,
        accumulation=split.accumulation,
        memory=needed(split),
        sent=sent(regime_of(config, split), sizes),
        reads=None if dataset is None else reads(config, dataset, world_size),
        gpu_memory=there,
        largest=None if there is None else _largest(needed, split, there),
    )


def _largest(
    needed: Callable[[BatchSplit], Memory], split: BatchSplit, there: float
) -> tuple[int, int] | None:
    """The largest divisor of a rank's share of the batch that fits, and its accumulation."""
    share = split.sequences // split.ranks
    for micro in range(share, 0, -1):
        if share % micro:
            continue
        accumulation = share // micro
        with suppress(UserError):  # the user's own DeepSpeed configuration has another
            if needed(replace(split, micro=micro, accumulation=accumulation)).peak <= there:
                return micro, accumulation
    return None


def sent(regime: Regime, sizes: Sizes) -> dict[str, int]:
    """Bytes that a rank sends in a step.

    A ring of W ranks sends (W - 1) / W of what it gathers or scatters, and twice that of what it
    reduces for all. DeepSpeed reduces gradients for all at stages 0 to 2, at stage 2 in every micro
    step; stages 1 and 2 gather the weights once. Stage 3 gathers them in every micro step, twice
    where they are too many to be kept, and scatters gradients; for an optimiser that
    `gathers` it reduces them for all, and gathers the optimiser's own weights as often.
    """
    n, stage, split = sizes.total, regime.stage, regime.split
    ring = (split.ranks - 1) / split.ranks
    gathered = regime.kind.gathers * sizes.own if stage == 3 else 0
    reductions = split.accumulation if stage >= 2 else 1
    gradients = reductions * (1 if stage == 3 and not gathered else 2) * n
    gathers = {
        0: 0,
        1: 1,
        2: 1,
        3: split.accumulation * (1 if n <= regime.gathered else 2),
    }[stage]
    codes = split.accumulation * sum(cost.sent for cost in regime.costs(accelerated=True))
    parts = {
        "gradients": gradients * regime.communication_bytes,
        "weights": gathers * n * regime.weight_bytes,
        **({regime.optimizer: gathered * regime.communication_bytes} if gathered else {}),
        "latents": codes,
    }
    return {part: round(ring * size) for part, size in parts.items()}


def reads(config: Config, dataset: Dataset, world_size: int) -> Reads:
    """What a rank reads, found from the order of the data over a window of every lane."""
    batch = config.data.global_batch_size
    window_of_every_lane = LANES * WINDOW * dataset.indexes[0].block_size
    steps = max(1, min(window_of_every_lane, dataset.sequences("train")) // batch)
    looked_at = {0, world_size // 2, world_size - 1}
    amounts = []
    for rank in looked_at:
        with ShardStream(
            dataset,
            seed=config.run.seed,
            global_batch_size=batch,
            rank=rank,
            world_size=world_size,
            sort_by_length=config.data.sort_by_length,
        ) as stream:
            amounts.append(stream.bytes_read(steps))
    most, every = max(own for own, _ in amounts), amounts[0][1]
    per_epoch = most * dataset.sequences("train") / (steps * batch)
    return Reads(most / steps, per_epoch, most / (every / world_size))


def shown(found: Plan) -> Group:
    """A plan for people."""
    where = "accelerator" if found.accelerated else "CPU"
    ranks = f"{found.world_size} rank{'s' * (found.world_size > 1)}"
    head = (
        f"{found.parameters:,} parameters on {ranks}, one {where} each; a step of a rank is "
        f"{found.accumulation} x {found.micro_batch_size} sequences of up to {found.length} tokens"
    )
    grid = Table("memory of a rank", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    moments = {"backward pass": found.memory.backward, "optimiser's step": found.memory.step}
    for moment in moments:
        grid.add_column(moment, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        sizes = (parts.get(part, 0) for parts in moments.values())
        grid.add_row(part, *(_size(size) if size else "-" for size in sizes))
    sums = (_size(sum(parts.values())) for parts in moments.values())
    grid.add_row("together", *sums, style="bold")
    lines = [_verdict(found), _host(found.memory.host), _sent(found.sent), _reads(found.reads)]
    return Group(Text(head), Text(), grid, Text(), *(Text(line) for line in lines if line))


def _verdict(found: Plan) -> str:
    if found.gpu_memory is None:
        return f"memory: {_size(found.memory.peak)}"
    answer = "fits in" if found.fits else "does not fit in"
    text = f"memory: {_size(found.memory.peak)} {answer} {_size(found.gpu_memory)}; "
    if found.largest is None:
        return text + (
            "no micro batch does: try a higher deepspeed.zero_stage, model.gradient_checkpointing, "
            "deepspeed.offload_optimizer, or more ranks"
        )
    micro, accumulation = found.largest
    return text + (
        f"the largest micro batch that does is data.micro_batch_size={micro} "
        f"(accumulation {accumulation})"
    )


def _host(parts: dict[str, int]) -> str:
    told = ", ".join(f"{part} {_size(size)}" for part, size in parts.items())
    return f"host memory: {_size(sum(parts.values()))} ({told})" if parts else ""


def _sent(parts: dict[str, int]) -> str:
    told = ", ".join(f"{part} {_size(size)}" for part, size in parts.items() if size)
    return f"sent in a step: {_size(sum(parts.values()))}" + (f" ({told})" if told else "")


def _reads(found: Reads | None) -> str:
    if found is None:
        return ""
    return (
        f"read in a step: {_size(found.per_step)}; in an epoch: {_size(found.per_epoch)}, "
        f"{found.over_fair:.2f} times a fair share"
    )


def _size(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:.0f} B"
