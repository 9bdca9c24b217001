"""How much memory training takes on one rank, part by part.

What DeepSpeed 0.19 holds was read in its source and found again in what torch allocates; the tests
hold the sums against real runs. Half precision is bf16 or fp16; n is the number of parameters, W of
ranks, s the bytes of a weight.
"""

from dataclasses import dataclass, field

from torch import nn

from t5vae.common.kinds import OPTIMISERS, find
from t5vae.config import BatchSplit, Config
from t5vae.objective import Cost, Term
from t5vae.planning.activations import Activations
from t5vae.training.engine import BUCKET, deepspeed_config, grouped
from t5vae.training.optimisers import Optimiser

PYTHON = 520 * 2**20  # a process with torch, transformers and DeepSpeed, on a CPU: measured
KEPT = 0.1  # of all else, that allocators keep or lose between blocks: measured on CPUs
CUDA = 1200 * 2**20  # a context, its libraries and NCCL: an estimate, it varies by device


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

    @property
    def weight_bytes(self) -> int:
        return 2 if self.half else 4

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
    zero = settings["zero_optimization"]
    kept = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    return Regime(
        stage=config.deepspeed.zero_stage,
        half=config.train.half,
        optimizer=config.optim.name,
        latent_size=config.model.latent_size,
        terms=tuple(config.objective.computed.values()),
        split=split,
        offloads_optimizer=config.deepspeed.offload_optimizer,
        offloads_parameters=config.deepspeed.offload_parameters,
        bucket=int(float(zero.get("reduce_bucket_size", 0))),
        gathered=int(min(float(zero.get(name, 1e9)) for name in kept)),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, in the two moments that may need most.

    Attributes:
        backward: by part, in the backward pass.
        step: by part, in the optimiser's step.
        host: by part, in host memory beside that, where something is offloaded there.
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
    n, stage, s, split = sizes.total, regime.stage, regime.weight_bytes, regime.split
    world_size = split.ranks
    ranks = world_size if stage else 1
    states = _states(regime, sizes)
    # What ZeRO reduces is copied into a buffer first; stage 0 flattens what it reduces.
    wanted = regime.bucket or min(BUCKET, n)
    bucket = wanted if accelerated and stage else min(wanted, n)
    extra = regime.kind.extra_bytes(stage, s)
    undivided = stage == 0 or (stage == 1 and split.accumulation > 1)
    gradients = n * s // (1 if undivided else world_size)
    gathered = min(n, regime.gathered) * s if stage == 3 and world_size > 1 else 0
    transient = min(n, wanted) * s if stage == 3 and world_size > 1 else 0
    copies = 0 if stage == 0 and not regime.half else 4 * n // ranks

    activations = kept.at(split.micro)
    if split.accumulation == 1 and stage < 3:
        # As activations are given up, gradients take their place.
        activations = max(0, activations - gradients)
    else:
        activations = max(activations, transient)
    common = {
        "runtime": CUDA if accelerated else PYTHON,
        **states,
        "gradients": gradients,
        **{part: sizes.own * size // ranks for part, size in extra.items() if sizes.own},
    }
    backward = {
        **common,
        "communication buffers": bucket * s + gathered,
        "activations": activations,
        "latents": sum(cost.memory for cost in regime.costs(accelerated=accelerated)),
    }
    step = {
        **common,
        "communication buffers": bucket * s if stage == 3 else 0,
        "fp32 gradients": copies,
        "update": _update(sizes, ranks, accelerated),
    }
    for parts in (backward, step):
        parts["allocator"] = round(KEPT * (sum(parts.values()) - parts["runtime"]))
    return Memory(*_offload(regime, accelerated, backward, step))


def _states(regime: Regime, sizes: Sizes) -> dict[str, int]:
    """What is there all the time: weights, fp32 weights beside them, moments.

    From ZeRO stage 1 on the optimiser's are dealt to the ranks, from 3 on the weights too
    (Rajbhandari et al., arXiv 1910.02054).
    """
    n, stage, half, world_size = sizes.total, regime.stage, regime.half, regime.split.ranks
    weights = n * regime.weight_bytes
    masters = 4 * n if half or stage else 0  # ZeRO keeps its own fp32 weights even of fp32 ones
    own = regime.kind.moment_bytes(stage, regime.weight_bytes)
    moments = own * sizes.own + 8 * (n - sizes.own)  # two of AdamW's, in fp32
    return {
        "weights": weights // (world_size if stage == 3 else 1),
        "fp32 weights": masters // (world_size if stage else 1),
        "moments": moments // (world_size if stage else 1),
    }


def state_bytes(regime: Regime, sizes: Sizes) -> int:
    """Bytes of a rank for weights, gradients and the optimiser's state, between two steps."""
    dealt = regime.split.ranks if regime.stage >= 2 else 1
    gradients = sizes.total * regime.weight_bytes // dealt
    return sum(_states(regime, sizes).values()) + gradients


def _update(sizes: Sizes, ranks: int, accelerated: bool) -> int:
    """What AdamW's step needs besides: copies of the second moment, in fp32.

    ZeRO updates a group of parameters at once, its part of them as one array; without ZeRO torch
    takes all together. On a CPU one pass needs no copies.
    """
    return 4 * sizes.largest_group // ranks if accelerated else 0


def _offload(
    regime: Regime, accelerated: bool, backward: dict[str, int], step: dict[str, int]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Move what is offloaded from the accelerator's memory to the host's."""
    away = {
        "fp32 weights": regime.offloads_optimizer,
        "moments": regime.offloads_optimizer,
        "fp32 gradients": regime.offloads_optimizer,
        "update": regime.offloads_optimizer,
        "weights": regime.offloads_parameters,
    }
    if not accelerated or not any(away.values()):
        return backward, step, {}
    host = {"runtime": PYTHON, **{part: step[part] for part, moved in away.items() if moved}}
    return (
        {part: size for part, size in backward.items() if not away.get(part)},
        {part: size for part, size in step.items() if not away.get(part)},
        host,
    )
