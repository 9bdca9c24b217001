"""How much memory training takes on one rank, part by part.

What DeepSpeed 0.19 holds was read in its source and found again in what torch allocates; the tests
hold the sums against real runs. Half precision is bf16 or fp16; n is the number of parameters, W of
ranks, s the bytes of a weight.
"""

from dataclasses import dataclass, field

from torch import nn

from t5vae.config import Config
from t5vae.planning.activations import Activations
from t5vae.training.engine import BUCKET, deepspeed_config

PYTHON = 520 * 2**20  # a process with torch, transformers and DeepSpeed, on a CPU: measured
KEPT = 0.1  # of all else, that allocators keep or lose between blocks: measured on CPUs
CUDA = 1200 * 2**20  # a context, its libraries and NCCL: an estimate, it varies by device


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, as the optimiser's groups have them.

    Attributes:
        total: n.
        muon: those that Muon updates.
        largest_group: of the largest group that AdamW updates at once.
    """

    total: int
    muon: int
    largest_group: int


def sizes_of(model: nn.Module, optimizer: str) -> Sizes:
    """Count a model's parameters, on any device, meta included."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = muon = others = 0
    for parameter in model.parameters():
        if parameter.dim() < 2:
            others += parameter.numel()
        elif optimizer == "muon" and id(parameter) not in embeddings:
            muon += parameter.numel()
        else:
            matrices += parameter.numel()
    return Sizes(matrices + muon + others, muon, max(matrices, others))


@dataclass(frozen=True)
class Limits:
    """What DeepSpeed is told to hold at most, in elements; from the user's own settings, or its
    defaults.

    Attributes:
        bucket: reduced at once, for which there is a buffer; 0 for what a run sets itself.
        gathered: kept gathered at stage 3, if they will be used again.
    """

    bucket: int
    gathered: int


def limits(config: Config, world_size: int) -> Limits:
    """DeepSpeed's limits for a run."""
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    gathered = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    return Limits(
        bucket=int(float(zero.get("reduce_bucket_size", 0))),
        gathered=int(min(float(zero.get(name, 1e9)) for name in gathered)),
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


def memory(
    config: Config,
    sizes: Sizes,
    kept: Activations,
    *,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    accelerated: bool,
) -> Memory:
    """The memory of one rank.

    Args:
        config: the run's.
        sizes: of its model.
        kept: what a forward pass keeps for the longest sequences.
        micro_batch_size: sequences of one rank in one forward pass.
        accumulation: micro batches in a step.
        world_size: W.
        accelerated: on an accelerator, where buffers take what was asked for; in a host's memory
            they take what was written.
    """
    n, stage = sizes.total, config.deepspeed.zero_stage
    half = config.train.half
    s = 2 if half else 4
    ranks = world_size if stage else 1
    most = limits(config, world_size)
    states = _states(config, sizes, world_size)
    # What ZeRO reduces is copied into a buffer first; stage 0 flattens what it reduces.
    wanted = most.bucket or min(BUCKET, n)
    bucket = wanted if accelerated and stage else min(wanted, n)
    # Until a step is known to be one, ZeRO keeps Muon's new momentum apart.
    staged = sizes.muon * s // world_size if stage in (1, 2) else 0
    undivided = stage == 0 or (stage == 1 and accumulation > 1)
    gradients = n * s // (1 if undivided else world_size)
    gathered = min(n, most.gathered) * s if stage == 3 and world_size > 1 else 0
    transient = min(n, wanted) * s if stage == 3 and world_size > 1 else 0
    copies = 0 if stage == 0 and not half else 4 * n // ranks

    activations = kept.at(micro_batch_size)
    if accumulation == 1 and stage < 3:
        # As activations are given up, gradients take their place.
        activations = max(0, activations - gradients)
    else:
        activations = max(activations, transient)
    rows = micro_batch_size * world_size
    common = {
        "runtime": CUDA if accelerated else PYTHON,
        **states,
        "gradients": gradients,
        **({"staged momentum": staged} if staged else {}),
    }
    backward = {
        **common,
        "communication buffers": bucket * s + gathered,
        "activations": activations,
        "latents": _latents(micro_batch_size, rows, config.model.latent_size, accelerated),
    }
    step = {
        **common,
        "communication buffers": bucket * s if stage == 3 else 0,
        "fp32 gradients": copies,
        "update": _update(config, sizes, ranks, accelerated),
    }
    for parts in (backward, step):
        parts["allocator"] = round(KEPT * (sum(parts.values()) - parts["runtime"]))
    return Memory(*_offload(config, accelerated, backward, step))


def _states(config: Config, sizes: Sizes, world_size: int) -> dict[str, int]:
    """What is there all the time: weights, fp32 weights beside them, moments.

    From ZeRO stage 1 on the optimiser's are dealt to the ranks, from 3 on the weights too
    (Rajbhandari et al., arXiv 1910.02054).
    """
    n, stage = sizes.total, config.deepspeed.zero_stage
    half = config.train.half
    weights = n * (2 if half else 4)
    masters = 4 * n if half or stage else 0  # ZeRO keeps its own fp32 weights even of fp32 ones
    momentum = 2 if half and stage == 3 else 4  # at stage 3 Muon's is of the gradients' dtype
    moments = {
        "adamw": 8 * n,
        "lion": 4 * n,
        "muon": momentum * sizes.muon + 8 * (n - sizes.muon),
    }[config.optim.name]
    return {
        "weights": weights // (world_size if stage == 3 else 1),
        "fp32 weights": masters // (world_size if stage else 1),
        "moments": moments // (world_size if stage else 1),
    }


def state_bytes(config: Config, sizes: Sizes, world_size: int) -> int:
    """Bytes of a rank for weights, gradients and the optimiser's state, between two steps."""
    stage, half = config.deepspeed.zero_stage, config.train.half
    gradients = sizes.total * (2 if half else 4) // (world_size if stage >= 2 else 1)
    return sum(_states(config, sizes, world_size).values()) + gradients


def _update(config: Config, sizes: Sizes, ranks: int, accelerated: bool) -> int:
    """What an optimiser's step needs besides: copies of the second moment, in fp32.

    ZeRO updates a group of parameters at once, its part of them as one array; without ZeRO torch
    takes all together. On a CPU one pass needs no copies.
    """
    if config.optim.name == "lion" or not accelerated:
        return 0
    return 4 * sizes.largest_group // ranks


def _latents(rows: int, every: int, latent_size: int, accelerated: bool) -> int:
    """Codes of all ranks, copies of them, and the tiles of MMD, in fp32; as
    `t5vae.objective.blocked` has them."""
    height, width = (4096, 8192) if accelerated else (1152, 2304)
    tiles = 3 * min(height, rows) * min(width, every)
    return 4 * (2 * every * (latent_size + 1) + (rows + every) * (latent_size + 2) + tiles)


def _offload(
    config: Config, accelerated: bool, backward: dict[str, int], step: dict[str, int]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Move what is offloaded from the accelerator's memory to the host's."""
    away = {
        "fp32 weights": config.deepspeed.offload_optimizer,
        "moments": config.deepspeed.offload_optimizer,
        "fp32 gradients": config.deepspeed.offload_optimizer,
        "update": config.deepspeed.offload_optimizer,
        "weights": config.deepspeed.offload_parameters,
    }
    if not accelerated or not any(away.values()):
        return backward, step, {}
    host = {"runtime": PYTHON, **{part: step[part] for part, moved in away.items() if moved}}
    return (
        {part: size for part, size in backward.items() if not away.get(part)},
        {part: size for part, size in step.items() if not away.get(part)},
        host,
    )
