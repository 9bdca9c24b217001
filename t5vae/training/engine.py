"""DeepSpeed: its configuration from ours, its engine, and what is read back from it."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function as phase
from transformers import PreTrainedModel

from t5vae.common.errors import UserError
from t5vae.config import BatchSplit, DeepSpeed, Optim
from t5vae.training.muon import muon_on_cpu

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once unless it is told otherwise."""


def deepspeed_config(
    deepspeed: DeepSpeed, optim: Optim, precision: str | None, split: BatchSplit
) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, over the user's own.

    Raises:
        UserError: where the user's own contradicts ours, with both values, or is not readable.
    """
    clipping = optim.gradient_clipping
    if clipping is None:
        clipping = 0.0 if optim.name == "muon" else 1.0
    offloaded = {
        "offload_optimizer": deepspeed.offload_optimizer,
        "offload_param": deepspeed.offload_parameters,
    }
    ours: dict[str, Any] = {
        "train_batch_size": split.sequences,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": clipping,
        "zero_optimization": {
            "stage": deepspeed.zero_stage,
            **{name: {"device": "cpu"} for name, wanted in offloaded.items() if wanted},
        },
        # The optimiser is handed to DeepSpeed as an object: it is AdamW or DeepSpeed's own Muon.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if optim.name == "muon" and deepspeed.zero_stage == 3:
        ours["zero_optimization"]["reduce_scatter"] = False  # Muon needs whole gradients
    theirs = _user_config(deepspeed.config)
    for kind in ("bf16", "fp16"):
        if kind == precision or kind in theirs:
            ours[kind] = {"enabled": kind == precision}
    for name, instead in (("optimizer", "optim"), ("scheduler", "optim.schedule")):
        if name in theirs:
            raise UserError(
                f"deepspeed.config sets {name}, which would not be used: set {instead} in its place"
            )
    merged = _merge(theirs, ours)
    _refuse_unsaved(merged)
    return {"steps_per_print": 2**31, **merged}


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's configuration."""
    return settings["zero_optimization"]["stage"]


def is_half(settings: dict[str, Any]) -> bool:
    """Whether weights and activations have 16 bits."""
    return any(settings.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))


def _refuse_unsaved(merged: dict[str, Any]) -> None:
    """Refuse what keeps weights or moments where a checkpoint would not find them."""
    for name in ("offload_optimizer", "offload_param"):
        if (merged["zero_optimization"].get(name) or {}).get("device") == "nvme":
            raise UserError(
                f"deepspeed.config sets zero_optimization.{name}.device to nvme, whose state no "
                "checkpoint has: use cpu"
            )
    accumulates = (merged.get("data_types") or {}).get("grad_accum_dtype")
    in_bf16 = merged.get("bf16", {}).get("enabled")
    offloaded = merged["zero_optimization"].get("offload_optimizer")
    if stage_of(merged) == 1 and in_bf16 and accumulates == "fp32" and not offloaded:
        raise UserError(
            "deepspeed.config sets data_types.grad_accum_dtype to fp32, for which DeepSpeed has "
            "another optimiser at stage 1 that knows no Muon: set deepspeed.zero_stage to 2"
        )


def _user_config(given: str | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(given, str):
        return given or {}
    try:
        content = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {given} is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"deepspeed.config: {given} holds no JSON object")
    return content


def _merge(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(theirs)
    for key, value in ours.items():
        if key not in theirs or theirs[key] == "auto":
            merged[key] = value
        elif isinstance(value, dict) and isinstance(theirs[key], dict):
            merged[key] = _merge(theirs[key], value, f"{prefix}{key}.")
        elif theirs[key] != value:
            raise UserError(
                f"deepspeed.config sets {prefix}{key} to {theirs[key]!r}, but the run's "
                f"configuration makes it {value!r}; leave it out, or make them agree"
            )
    return merged


def schedule(step: int, steps: int, optim: Optim) -> float:
    """The share of the learning rate at a step (from 0), a pure function of it."""
    warmup = round(optim.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (1 - optim.final_lr) * left


def set_learning_rate(engine: Any, share: float) -> None:
    """Set every group of parameters to a share of its own learning rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = share * group["full_lr"]


@contextlib.contextmanager
def sharded(settings: dict[str, Any], *, pretrained: bool) -> Iterator[None]:
    """At ZeRO stage 3, deal every layer's weights to the ranks as soon as it is made.

    So no rank ever holds the whole of a model with random weights, which are those that it would
    have at any other stage.

    Args:
        settings: DeepSpeed's configuration.
        pretrained: whether the model's weights are read, not drawn.
    """
    if stage_of(settings) < 3 or pretrained:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters, Init

    draw = PreTrainedModel._initialize_weights

    def draw_gathered(self: PreTrainedModel, module: nn.Module, *args: Any) -> None:
        layers = [module, *module.children()]
        weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        with GatheredParameters(weights, modifier_rank=0):
            dtypes = [weight.dtype for weight in weights]
            for weight in weights:
                weight.data = weight.data.float()  # other numbers are drawn in half precision
            draw(self, module, *args)
            for weight, dtype in zip(weights, dtypes, strict=True):
                weight.data = weight.data.to(dtype)

    PreTrainedModel._initialize_weights = draw_gathered
    try:
        with Init(config_dict_or_path=settings):
            yield
    finally:
        PreTrainedModel._initialize_weights = draw


def build_engine(model: nn.Module, settings: dict[str, Any], optim: Optim) -> Any:
    """Wrap a model in a DeepSpeed engine with its optimiser.

    Args:
        model: on this rank's device, or sharded.
        settings: DeepSpeed's configuration.
        optim: what to update it with.

    Raises:
        UserError: if the device cannot compute in this precision.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if settings.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise UserError("this device does not compute in fp16: set train.precision to bf16 or fp32")
    elements = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    # More of the buffer that this makes in every step would stay empty.
    bucket = {"reduce_bucket_size": min(BUCKET, elements)}
    zero = bucket | settings["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    optimizer = _optimizer(
        model,
        optim,
        dist.get_world_size(),
        on_cpu=get_accelerator().device_name() == "cpu",
        offloaded=offload.get("device") == "cpu",
    )
    unpartitioned, half = stage_of(settings) == 0, is_half(settings)
    if unpartitioned and not half:
        _skip_nonfinite(optimizer)
    settings = settings | {"zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if unpartitioned and half:
        _undo_first_step(engine.optimizer)
    return engine


@torch.no_grad()
def _undo_first_step(optimizer: Any) -> None:
    """Forget the step without gradients that DeepSpeed took: it counts, and decayed the weights."""
    optimizer.optimizer.state.clear()
    for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            master.copy_(weight)


def _skip_nonfinite(optimizer: torch.optim.Optimizer) -> None:
    """Leave weights and moments alone where a gradient is not finite.

    DeepSpeed does so at every other stage and precision, and calls it an overflow.
    """
    step = optimizer.step

    def step_if_finite() -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        optimizer.overflow = not norms.isfinite().all()
        if not optimizer.overflow:
            step()

    optimizer.step = step_if_finite


def _optimizer(
    model: nn.Module, optim: Optim, world_size: int, *, on_cpu: bool, offloaded: bool
) -> torch.optim.Optimizer:
    """AdamW or Lion for all, or Muon for the matrices between embedding and logits and AdamW else.

    Muon: momentum orthogonalised by Newton and Schulz's iteration (Jordan et al., 2024), as
    DeepSpeed implements it for every ZeRO stage. Weight decay falls on matrices alone.

    Raises:
        UserError: for Lion where DeepSpeed has none.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        parameter.use_muon = optim.name == "muon" and matrix and id(parameter) not in embeddings
        groups.setdefault((parameter.use_muon, matrix), []).append(parameter)

    adam = {"betas": optim.betas, "eps": optim.eps}
    # The Gram variant needs fewer operations, but in fp16.
    muon = {"momentum": optim.momentum, "ns_method": "standard" if on_cpu else "gram"}
    settings = []
    for (use_muon, matrix), parameters in groups.items():
        lr = optim.muon_lr if use_muon else optim.lr
        own = muon if use_muon else adam
        decay = optim.weight_decay if matrix else 0.0
        settings.append(
            {"params": parameters, "lr": lr, "full_lr": lr, "weight_decay": decay, **own}
        )
    fused = {"fused": True} if on_cpu or offloaded else {}  # on a CPU: in one pass, vectorised
    if optim.name == "adamw":
        return torch.optim.AdamW(settings, **fused)
    if optim.name == "lion":
        return _lion(settings, offloaded)

    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group, use_muon in zip(settings, (use_muon for use_muon, _ in groups), strict=True):
        group["use_muon"] = use_muon
    if on_cpu:
        muon_on_cpu(optim.muon_precision)
        adam = {"adam_optimizer": torch.optim.AdamW, "adam_optimizer_kwargs": fused}
    else:
        adam = {}
    optimizer = MuonWithAuxAdam(settings, **adam)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            group["params"] = _dealt(group["params"], world_size)
    return optimizer


def _dealt(matrices: list[nn.Parameter], ranks: int) -> list[nn.Parameter]:
    """The same matrices in an order of which DeepSpeed's equal partitions have equal work.

    Equal ones are dealt to the ranks in turn. A rank updates the whole of every matrix of which its
    partition has a part, so few should be cut.
    """

    def sizes(matrix: nn.Parameter) -> list[int]:
        return sorted(getattr(matrix, "ds_shape", matrix.shape), reverse=True)

    largest_first = sorted(matrices, key=sizes, reverse=True)
    return [matrix for rank in range(ranks) for matrix in largest_first[rank::ranks]]


def _lion(settings: list[dict[str, Any]], offloaded: bool) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    if not offloaded and not torch.cuda.is_available():
        raise UserError(
            "optim.name lion needs a CUDA device, or deepspeed.offload_optimizer for the host's; "
            "use adamw or muon"
        )
    groups = [{k: v for k, v in group.items() if k != "eps"} for group in settings]
    return (DeepSpeedCPULion if offloaded else FusedLion)(groups)


def backward(engine: Any, loss: Tensor) -> None:
    """The gradient of a micro batch's loss."""
    with phase("backward"):
        engine.backward(loss)


def update(engine: Any) -> None:
    """After each micro batch; after the last one the weights are updated."""
    with phase("optimizer"):
        engine.step()


def gradient_norm(engine: Any, optim: Optim) -> dict[str, float]:
    """`grad_norm` of the last step before clipping, where DeepSpeed tells it: under Muon its norm
    is that of the orthogonalised update."""
    norm = engine.get_global_grad_norm()
    if norm is None or optim.name == "muon":
        return {}
    return {"grad_norm": float(norm) if engine.was_step_applied() else math.nan}
