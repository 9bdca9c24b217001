"""How much memory training takes on one rank, part by part.

What DeepSpeed 0.19 holds was read in its source and found again in what torch allocates; the tests
hold the sums against real runs. Half precision is bf16 or fp16; n is the number of parameters.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from t5vae.common.errors import UserError
from t5vae.common.kinds import OPTIMISERS, find
from t5vae.config import BatchSplit, Config
from t5vae.objective import Cost, Term
from t5vae.planning.activations import Activations
from t5vae.training.deepspeed_settings import deepspeed_config
from t5vae.training.engine import bucket, grouped
from t5vae.training.optimisers import Optimiser

PYTHON = 520 * 2**20  # a process with torch, transformers and DeepSpeed, on a CPU: measured
KEPT = 0.1  # of all else, that allocators keep or lose between blocks: measured on CPUs
CUDA = 1200 * 2**20  # a context, its libraries and NCCL: an estimate, it varies by device
FP32 = ("fp32", "float32", "float", "torch.float32")  # as DeepSpeed's configuration names it


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, as the optimiser's groups have them.

    Attributes:
        total: n.
        own: those that the optimiser takes for itself.
        largest_group: of the largest group that AdamW updates at once.
    """

    total: int
    own: int
    largest_group: int


def sizes_of(model: nn.Module, optimizer: str) -> Sizes:
    """Count a model's parameters, on any device, meta included."""
    groups = {
        group: sum(weight.numel() for weight in weights)
        for group, weights in grouped(model, find(OPTIMISERS, optimizer)).items()
    }
    rest = [size for (own, _), size in groups.items() if not own]
    total = sum(groups.values())
    return Sizes(total, total - sum(rest), max(rest, default=0))


@dataclass(frozen=True)
class Regime:
    """What of a run its memory depends on, beside its model.

    Attributes:
        stage: of ZeRO.
        half: whether weights and activations have 16 bits.
        optimizer: its name.
        latent_size: D.
        terms: of the objective, those that are computed.
        split: how the global batch is dealt.
        offloads_optimizer, offloads_parameters: to the host's memory.
        bucket: elements that DeepSpeed reduces at once; 0 for what a run sets itself.
        gathered: elements that it keeps gathered at stage 3, if they will be used again.
        communication_bytes: of a gradient that is summed over ranks.
        accumulation_bytes: of a gradient that is summed over micro steps.
        overlaps: whether accelerators reduce beside the backward pass at stages 1 and 2.
        stages_saves: whether a save copies the state to host memory, and writes it later.
    """

    stage: int
    half: bool
    optimizer: str
    latent_size: int
    terms: tuple[Term, ...]
    split: BatchSplit
    offloads_optimizer: bool
    offloads_parameters: bool
    bucket: int
    gathered: int
    communication_bytes: int
    accumulation_bytes: int
    overlaps: bool
    stages_saves: bool

    @property
    def weight_bytes(self) -> int:
        return 2 if self.half else 4

    @property
    def sums_in_place(self) -> bool:
        """Whether reduced gradients are added to one fp32 sum, but for the optimiser's own."""
        more = self.accumulation_bytes > self.weight_bytes
        return self.stage in (1, 2) and more and not self.offloads_optimizer

    @property
    def moment_bytes(self) -> int:
        """Of the moments of a weight that the optimiser takes for itself."""
        given = self.communication_bytes if self.stage == 3 else self.weight_bytes
        return self.kind.moment_bytes(self.stage, given)

    def saved(self, sizes: Sizes) -> int:
        """Bytes of a rank's file in a checkpoint: fp32 weights and moments, dealt at any stage."""
        return (4 * sizes.total + self.moments(sizes)) // self.split.ranks

    def moments(self, sizes: Sizes) -> int:
        """Bytes of all ranks' moments; those of AdamW are two, in fp32."""
        return self.moment_bytes * sizes.own + 8 * (sizes.total - sizes.own)

    def costs(self, *, accelerated: bool) -> list[Cost]:
        """Of each term, to a rank in a micro step."""
        rows, every = self.split.micro, self.split.micro * self.split.ranks
        return [
            term.cost(rows, every, self.latent_size, accelerated=accelerated) for term in self.terms
        ]

    @property
    def kind(self) -> type[Optimiser]:
        return find(OPTIMISERS, self.optimizer)


def regime_of(config: Config, split: BatchSplit) -> Regime:
    """How a run holds its state, by its configuration and DeepSpeed's, the user's own included."""
    settings = deepspeed_config(config.deepspeed, config.optim, config.train.precision, split)
    zero, stage = settings["zero_optimization"], config.deepspeed.zero_stage
    offloads = config.deepspeed.offload_optimizer
    weight_bytes = 2 if config.train.half else 4
    summed = (settings.get("data_types") or {}).get("grad_accum_dtype")
    kept = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    return Regime(
        stage=stage,
        half=config.train.half,
        optimizer=config.optim.name,
        latent_size=config.model.latent_size,
        terms=tuple(config.objective.computed.values()),
        split=split,
        offloads_optimizer=offloads,
        offloads_parameters=config.deepspeed.offload_parameters,
        bucket=_elements(zero, "reduce_bucket_size", 0) if stage else 0,
        gathered=min(_elements(zero, name, 1e9) for name in kept),
        communication_bytes=_bytes(settings.get("communication_data_type"), weight_bytes),
        accumulation_bytes=_bytes(summed, weight_bytes),
        overlaps=zero.get("overlap_comm", split.ranks > 1 and not offloads),
        stages_saves=config.checkpoint.asynchronous,
    )


def _elements(zero: dict[str, Any], name: str, default: float) -> int:
    """A number of DeepSpeed's, which may be written as 5e8 or "5e8".

    Raises:
        UserError: it is none.
    """
    given = zero.get(name, default)
    try:
        return int(float(given))
    except (OverflowError, TypeError, ValueError):
        raise UserError(f"deepspeed.config sets {name} to {given!r}: give a number") from None


def _bytes(dtype: object, default: int) -> int:
    if dtype is None:
        return default
    return 4 if str(dtype).lower() in FP32 else 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, in the two moments that may need most.

    Attributes:
        backward: by part, in the backward pass.
        step: by part, in the optimiser's step.
        host: by part, in host memory beside that, where something is offloaded or copied there.
    """

    backward: dict[str, int]
    step: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(sum(self.backward.values()), sum(self.step.values()))


def memory(regime: Regime, sizes: Sizes, kept: Activations, *, accelerated: bool) -> Memory:
    """The memory of one rank.

    Args:
        regime: the run's.
        sizes: of its model.
        kept: what a forward pass keeps for the longest sequences.
        accelerated: on an accelerator, where buffers take what was asked for; in a host's memory
            they take what was written.
    """
    n, stage, split = sizes.total, regime.stage, regime.split
    ranks = split.ranks if stage else 1
    overlaps = accelerated and regime.overlaps
    wanted = regime.bucket or bucket(stage, n)
    buffers, copies = _reduction(regime, n, wanted, accelerated=accelerated)
    whole = n * regime.accumulation_bytes
    undivided = stage == 0 or (stage == 1 and not (overlaps and split.accumulation == 1))
    gradients = whole if undivided else whole // ranks
    if stage == 2 and split.accumulation > 1 and not regime.sums_in_place:
        gradients *= 2  # a sum, and what a micro step adds to it
    if stage == 1 and undivided and accelerated:
        copies += whole // ranks  # room for this rank's part, before any of the rest is given up

    activations = kept.at(split.micro)
    if split.accumulation == 1 and stage < 3:
        # As activations are given up, gradients take their place.
        activations = max(0, activations - gradients)
    # When the first gradients are reduced, as large a part of the activations is gone.
    reduced = min(wanted, n) if stage > 1 or overlaps else n
    activations = max(activations, activations * (n - reduced) // n + copies)
    extra = regime.kind.extra_bytes(stage, regime.weight_bytes)
    staged = {"copy of the state": regime.saved(sizes)} if regime.stages_saves else {}
    common = {
        "runtime": CUDA if accelerated else PYTHON,
        **_states(regime, sizes),
        **{part: sizes.own * size // ranks for part, size in extra.items() if sizes.own},
        **({} if accelerated else staged),
    }
    gathered = min(n, regime.gathered) * regime.weight_bytes if stage == 3 and ranks > 1 else 0
    backward = {
        **common,
        "gradients": gradients,
        "communication buffers": buffers + gathered,
        "activations": activations,
        "latents": sum(cost.memory for cost in regime.costs(accelerated=accelerated)),
    }
    step = {
        **common,
        "gradients": whole // ranks,
        "communication buffers": buffers + _gathers(regime, sizes, wanted) if stage == 3 else 0,
        "fp32 gradients": _converted(regime, sizes) // ranks,
        "update": _update(sizes, ranks, accelerated),
    }
    for parts in (backward, step):
        parts["allocator"] = round(KEPT * (sum(parts.values()) - parts["runtime"]))
    if not accelerated:
        return Memory(backward, step)
    return Memory(*_offload(regime, backward, step, staged))


def _reduction(regime: Regime, n: int, wanted: int, *, accelerated: bool) -> tuple[int, int]:
    """Bytes of the buffers that gradients are reduced in, and of what these are copied to.

    Without ZeRO gradients are flattened where there is no buffer, at stages 1 and 2 where several
    ranks share one, and converted to be communicated. At stage 3 they are put into the ranks'
    order, unless they are reduced for all; gloo copies them once more.
    """
    filled = min(wanted, n)
    size = wanted if accelerated else filled
    ranks, sent, summed = regime.split.ranks, regime.communication_bytes, regime.accumulation_bytes
    if regime.stage == 3:
        ordered = sent * (1 if accelerated else 2)
        converted = summed if summed != sent else 0
        return size * sent, filled * (converted if regime.kind.gathers else ordered)
    given = summed if regime.stage == 1 else regime.weight_bytes
    flat = given if ranks > 1 or regime.stage == 0 else 0
    converted = sent if sent != given else 0
    buffers = (2 if accelerated and regime.overlaps else 1) if regime.stage else 0
    return buffers * size * given, filled * (flat + converted)


def _gathers(regime: Regime, sizes: Sizes, wanted: int) -> int:
    """What an optimiser that gathers holds of a bucket: gradients, momentum, and what comes in.

    Of the latter two a rank's part is held beside them.
    """
    if not regime.kind.gathers:
        return 0
    return round(min(wanted, sizes.own) * (3 + 2 / regime.split.ranks)) * regime.communication_bytes


def _converted(regime: Regime, sizes: Sizes) -> int:
    """All ranks' gradients in fp32, as the optimiser is given them, where they are copies."""
    if regime.stage == 0 and not regime.half:
        return 0
    return 4 * (sizes.own if regime.sums_in_place else sizes.total)


def _states(regime: Regime, sizes: Sizes) -> dict[str, int]:
    """What is there all the time: weights, fp32 weights beside them, moments.

    From ZeRO stage 1 on the optimiser's are dealt to the ranks, from 3 on the weights too
    (Rajbhandari et al., arXiv 1910.02054).
    """
    n, stage, half, world_size = sizes.total, regime.stage, regime.half, regime.split.ranks
    weights = n * regime.weight_bytes
    masters = 4 * n if half or stage else 0  # ZeRO keeps its own fp32 weights even of fp32 ones
    return {
        "weights": weights // (world_size if stage == 3 else 1),
        "fp32 weights": masters // (world_size if stage else 1),
        "moments": regime.moments(sizes) // (world_size if stage else 1),
    }


def state_bytes(regime: Regime, sizes: Sizes) -> int:
    """Bytes of a rank for weights, gradients and the optimiser's state, between two steps."""
    dealt = regime.split.ranks if regime.stage >= 2 else 1
    gradients = sizes.total * regime.accumulation_bytes // dealt
    return sum(_states(regime, sizes).values()) + gradients


def _update(sizes: Sizes, ranks: int, accelerated: bool) -> int:
    """What AdamW's step needs besides: copies of the second moment, in fp32.

    ZeRO updates a group of parameters at once, its part of them as one array; without ZeRO torch
    takes all together. On a CPU one pass needs no copies.
    """
    return 4 * sizes.largest_group // ranks if accelerated else 0


def _offload(
    regime: Regime, backward: dict[str, int], step: dict[str, int], host: dict[str, int]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Move what is offloaded from the accelerator's memory to the host's, which has more there."""
    moved = {
        "fp32 weights": regime.offloads_optimizer,
        "moments": regime.offloads_optimizer,
        "fp32 gradients": regime.offloads_optimizer,
        "update": regime.offloads_optimizer,
        "weights": regime.offloads_parameters,
    }
    away = {part: step[part] for part, is_moved in moved.items() if is_moved} | host
    return (
        {part: size for part, size in backward.items() if part not in away},
        {part: size for part, size in step.items() if part not in away},
        {"runtime": PYTHON, **away} if away else {},
    )
