"""How long a run will take and what it will cost, from what its ranks do and a machine's rates.

Counts are exact or upper bounds, rates are promises of sheets: a plan, no measurement. Nothing is
counted of latencies, launches of kernels, what is no product of matrices (norms, AdamW's update),
what offloading moves, evaluations, and waits for a slower rank.
"""

from dataclasses import dataclass

from torch import nn

from shards import Dataset
from t5vae.model import T5VAEConfig, training_flops
from t5vae.planning.machine import Rates
from t5vae.planning.memory import Regime
from t5vae.training.engine import grouped

HASHED = 1.5e9  # bytes of sha256 a second, on a core that has instructions for it: measured
HOUR = 3600


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: of a rank's device, by what it computes.
        sent: by part of what a rank sends.
        reading: of the shards, which threads read before they are needed.
        at_best: all overlaps that can: reading with everything, and with the pass that they belong
            to the gradients, and at ZeRO stage 3 the weights.
        at_most: nothing overlaps.
    """

    compute: dict[str, float]
    sent: dict[str, float]
    reading: float
    at_best: float
    at_most: float


@dataclass(frozen=True)
class CheckpointTime:
    """A checkpoint.

    Attributes:
        of_rank, in_all: bytes.
        seconds: to save it, and to go on from it with the same layout: each rank hashes its own
            file, and writes or reads it, at the node's network or all ranks' share of the disk,
            whichever is slower.
    """

    of_rank: int
    in_all: int
    seconds: float


@dataclass(frozen=True)
class Course:
    """Some steps, from the least that they take to the most, see `StepTime`.

    Attributes:
        hours: of the clock.
        device_hours: of all ranks.
        dollars: None where there is no price.
    """

    steps: float
    hours: tuple[float, float]
    device_hours: tuple[float, float]
    dollars: tuple[float, float] | None


def operations(
    settings: T5VAEConfig,
    regime: Regime,
    model: nn.Module,
    tokens: tuple[float, float],
    *,
    checkpointing: bool,
    accelerated: bool,
) -> dict[str, int]:
    """Products of matrices of a rank in a step, a multiply-add as two.

    Layers that are checkpointed are computed once more; the bottleneck, which is not, is counted
    with them. What an optimiser computes of its own matrices is dealt to the ranks from ZeRO stage
    1 on, but a matrix is one rank's, or of several that each update all of it.

    Args:
        settings: the model's.
        regime: of the run.
        model: on any device, meta included.
        tokens: of a sequence, as layers compute them and as they are scored.
        checkpointing: layers keep their inputs alone.
        accelerated: on accelerators.
    """
    split, (computed, scored) = regime.split, tokens
    rows, width = split.micro * split.accumulation, round(computed)
    pass_over = training_flops(settings, rows, width, width, round(rows * scored))
    again = training_flops(settings, rows, width, width, 0) // 3 if checkpointing else 0
    terms = sum(cost.operations for cost in regime.costs(accelerated=accelerated))
    matrices = [
        regime.kind.operations(weight.shape[0], weight.shape[1:].numel())
        for (own, _), weights in grouped(model, regime.kind).items()
        for weight in weights
        if own
    ]
    update = sum(matrices)
    if regime.stage and matrices:
        update = max(update // split.ranks, *matrices)
    parts = {
        "model": pass_over,
        "recomputed": again,
        "objective": split.accumulation * terms,
        regime.optimizer: update,
    }
    return {part: count for part, count in parts.items() if count}


def tokens_of(dataset: Dataset | None, length: int, *, accelerated: bool) -> tuple[float, float]:
    """Tokens of a sequence as layers compute them, and as they are scored.

    Accelerators compute pads, up to the longest sequence; a CPU computes real tokens alone, which
    are as many as the average. Without a dataset all are as long as the longest.
    """
    if dataset is None:
        return length, length
    splits = [index.split("train") for index in dataset.indexes]
    means = [split.tokens / split.sequences for split in splits]
    weighed = sum(mean * quota for mean, quota in zip(means, dataset.quotas, strict=True))
    mean = weighed / sum(dataset.quotas)
    return (length if accelerated else mean), mean


def step_time(
    regime: Regime,
    counts: dict[str, int],
    sent: dict[str, int],
    read: float,
    rates: Rates,
    *,
    nodes: int,
    accelerated: bool,
) -> StepTime | None:
    """Seconds of a step; None where the peak of a rank's device is not known.

    In a ring each rank sends to the next, so what leaves a node is what one rank sends, whatever
    number of adapters it is spread over: parts take as long as the slower of link and network.

    On accelerators DeepSpeed overlaps, with `overlap_comm`, as is its default at stage 3 and ours
    at 1 and 2: gradients with the backward pass at stage 2, with that of the last micro step at 1;
    at 3 gradients and weights with both passes. Of the three thirds of a pass's operations two are
    the backward pass's, where checkpointed layers are computed again too. Without ZeRO, and over
    gloo, nothing overlaps.

    Args:
        regime: of the run.
        counts: as `operations` has them.
        sent: bytes that a rank sends, by part.
        read: bytes of a rank from the shards, on average.
        rates: of the machine.
        nodes: hosts.
        accelerated: on accelerators.
    """
    if rates.peak is None:
        return None
    split = regime.split
    compute = {part: count / (rates.peak * rates.utilisation) for part, count in counts.items()}
    links = [rates.link] * (split.ranks > nodes) + [rates.network] * (nodes > 1)
    slowest = min(links, default=rates.link)
    seconds = {part: size / slowest for part, size in sent.items() if size}
    both = compute["model"] + compute.get("recomputed", 0) + compute.get("objective", 0)
    backward = both - (compute["model"] + compute.get("objective", 0)) / 3
    passes = {1: backward / split.accumulation, 2: backward, 3: both}
    beside = passes.get(regime.stage, 0.0) if accelerated and regime.overlaps else 0.0
    overlapping = seconds.get("gradients", 0.0)
    if regime.stage == 3:
        overlapping += seconds.get("weights", 0.0)
    reading = _together(read, split.ranks, nodes, rates.store, rates.network)
    work = sum(compute.values()) + sum(seconds.values())
    return StepTime(
        compute=compute,
        sent=seconds,
        reading=reading,
        at_best=max(work - min(beside, overlapping), reading),
        at_most=work + reading,
    )


def checkpoint_time(saved: int, rates: Rates, *, ranks: int, nodes: int) -> CheckpointTime:
    """A checkpoint of ranks that write so many bytes each."""
    moved = _together(saved, ranks, nodes, rates.disk, rates.network)
    return CheckpointTime(saved, saved * ranks, saved / HASHED + moved)


def course(steps: float, step: StepTime, ranks: int, price: float | None) -> Course:
    """What some steps take, and cost at a price in dollars an hour of a device."""
    hours = (steps * step.at_best / HOUR, steps * step.at_most / HOUR)
    device_hours = (hours[0] * ranks, hours[1] * ranks)
    dollars = None if price is None else (device_hours[0] * price, device_hours[1] * price)
    return Course(steps, hours, device_hours, dollars)


def _together(size: float, ranks: int, nodes: int, shared: float, network: float) -> float:
    """Seconds in which all ranks move so many bytes each, to or from a place that they share."""
    return max(size * ranks / nodes / network, size * ranks / shared)
