"""`t5vae plan`: what a run will need before it starts: memory, communication, reads, time."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from shards import Dataset, ShardStream
from t5vae.common.errors import UserError
from t5vae.config import BatchSplit, Config
from t5vae.model import T5VAE
from t5vae.planning.activations import activations
from t5vae.planning.describe import open_if_there
from t5vae.planning.machine import GIB, Machine, Rates
from t5vae.planning.memory import Memory, Regime, Sizes, memory, regime_of, sizes_of
from t5vae.planning.times import (
    CheckpointTime,
    Course,
    StepTime,
    checkpoint_time,
    course,
    operations,
    step_time,
    tokens_of,
)
from t5vae.training.build import is_installed, model_config
from t5vae.training.precision import settle, settled

MOST_RANKS = 1_000_000


@dataclass(frozen=True)
class Reads:
    """What one rank, or node, reads of the shards, in bytes; of those looked at, the one with most.

    Attributes:
        per_step, per_epoch: on average.
        over_fair: over an equal share of the data.
    """

    per_step: float
    per_epoch: float
    over_fair: float


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        undealt: why the configuration's own batch cannot be dealt to the ranks, and what can: the
            plan is of the first of these. None where it is dealt.
        ranks_per_node: all ranks over the hosts.
        parameters: of the model.
        length: tokens of the longest sequences, for which memory is planned.
        memory: of a rank, with the configuration's own micro batch.
        sent: bytes that a rank sends in a step, by part, as rings send them.
        reads, node_reads: of a rank, and of a node, whose ranks share what they read; None where
            the configuration names no shards that exist.
        rates: of the machine.
        operations: of a rank in a step, by part: products of matrices, a multiply-add as two.
        step: None where the peak of the device is not known.
        checkpoint: one of them.
        run: `train.steps` of such steps, without evaluations and saves; None as `step` is.
        epoch: the same of all training sequences once; None where there are no shards either.
        gpu_memory: bytes that there are; None where that is not given.
        largest: the largest micro batch that fits in it, and the accumulation that follows; None
            where none does, or that is not asked.
    """

    undealt: str | None
    world_size: int
    ranks_per_node: int
    accelerated: bool
    parameters: int
    length: int
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    memory: Memory
    sent: dict[str, int]
    reads: Reads | None
    node_reads: Reads | None
    rates: Rates
    operations: dict[str, int]
    step: StepTime | None
    checkpoint: CheckpointTime
    run: Course | None
    epoch: Course | None
    gpu_memory: float | None = None
    largest: tuple[int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it: bytes, operations, bytes or operations a second, seconds, hours, dollars."""
        store = {"store_per_epoch": self.store_per_epoch}
        return {**asdict(self), **store, "peak": self.memory.peak, "fits": self.fits}

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None where it is not known."""
        return None if self.gpu_memory is None else self.memory.peak <= self.gpu_memory

    @property
    def store_per_epoch(self) -> dict[str, float] | None:
        """Bytes that a node, and all nodes, have from the store of the shards in the first epoch.

        In later ones a node has from its cache what that holds.
        """
        if self.node_reads is None:
            return None
        of_node = self.node_reads.per_epoch
        return {"node": of_node, "all": of_node * self.world_size / self.ranks_per_node}


def plan(
    config: Config,
    *,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: float | None = None,
    machine: Machine | None = None,
) -> Plan:
    """Plan a run; nothing is allocated, and of the shards the index alone is read.

    Args:
        config: the run's. A batch that its ranks cannot share is replaced by the nearest.
        nodes: hosts.
        gpus_per_node: 0 for one rank a host, on its CPU.
        gpu_memory: GiB of one rank's device; of a host's memory without devices.
        machine: how fast it is; by default as `Machine` has it.

    Raises:
        UserError: for what else training would refuse of these, or numbers that are not above 0.
    """
    if gpu_memory is not None and not gpu_memory > 0:
        raise UserError(f"--gpu-memory is {gpu_memory:g}: give the GiB of one device")
    machine = machine or Machine()
    ranks_per_node, accelerated = max(1, gpus_per_node), gpus_per_node > 0
    world_size = nodes * ranks_per_node
    if world_size > MOST_RANKS:
        raise UserError(f"a run of {world_size} ranks: plans are of {MOST_RANKS} at most")
    config, split, undealt = _dealt(config, world_size)
    dataset = open_if_there(config)
    settings = model_config(config.model, config.objective, dataset)
    with torch.device("meta"):
        model = T5VAE(settings)
    sizes = sizes_of(model, config.optim.name)
    if accelerated:
        config = settled(config, "bf16")
    else:
        config, _ = settle(config, settings, split, torch.device("cpu"), {})
    rates = machine.rates(accelerated=accelerated, half=config.train.half)
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
    regime = regime_of(config, split)
    read = None if dataset is None else reads(config, dataset, world_size)
    of_node = None if dataset is None else reads(config, dataset, nodes)
    tokens = tokens_of(dataset, settings.sequence_length, accelerated=accelerated)
    counts = operations(
        settings,
        regime,
        model,
        tokens,
        checkpointing=config.model.gradient_checkpointing,
        accelerated=accelerated,
    )
    rings = sent(regime, sizes)
    per_step = read.per_step if read else 0.0
    step = step_time(regime, counts, rings, per_step, rates, nodes=nodes, accelerated=accelerated)

    def takes(steps: float) -> Course | None:
        return None if step is None else course(steps, step, world_size, machine.price)

    return Plan(
        undealt=undealt,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        accelerated=accelerated,
        parameters=sizes.total,
        length=settings.sequence_length,
        global_batch_size=split.sequences,
        micro_batch_size=split.micro,
        accumulation=split.accumulation,
        memory=needed(split),
        sent=rings,
        reads=read,
        node_reads=of_node,
        rates=rates,
        operations=counts,
        step=step,
        checkpoint=checkpoint_time(regime.saved(sizes), rates, ranks=world_size, nodes=nodes),
        run=takes(config.train.steps),
        epoch=takes(dataset.sequences("train") / split.sequences) if dataset else None,
        gpu_memory=there,
        largest=None if there is None else _largest(needed, split, there),
    )


def _dealt(config: Config, ranks: int) -> tuple[Config, BatchSplit, str | None]:
    """A configuration whose batch is dealt to ranks, how, and why its own could not be."""
    data = config.data
    try:
        return config, data.split(ranks), None
    except UserError as error:
        split = data.fitting(ranks)[0]
        micro = split.micro if data.micro_batch_size else None
        batch = {"global_batch_size": split.sequences, "micro_batch_size": micro}
        return config.with_("data", **batch), split, str(error)


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


def reads(config: Config, dataset: Dataset, parts: int) -> Reads:
    """What a rank of so many reads, or a node, found from the order of the data."""
    batch = config.data.global_batch_size
    amounts, steps = [], 1

    def stream(part: int, parts: int) -> ShardStream:
        return ShardStream(
            dataset,
            seed=config.run.seed,
            global_batch_size=batch,
            rank=part,
            world_size=parts,
        )

    for part in {0, parts // 2, parts - 1}:
        with stream(part, parts) as own:
            steps = max(1, min(own.period, dataset.sequences("train")) // batch)
            amounts.append(own.bytes_read(steps))
    most = max(amounts)
    with stream(0, 1) as every:
        fair = every.bytes_read(steps) / parts
    per_epoch = most * dataset.sequences("train") / (steps * batch)
    return Reads(most / steps, per_epoch, most / fair)
