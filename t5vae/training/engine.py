"""DeepSpeed's engine: made of a model and settings, taken through a step, and read."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from t5vae.cluster.phases import phase
from t5vae.common.errors import UserError
from t5vae.common.kinds import OPTIMISERS, find
from t5vae.config import Optim
from t5vae.training.deepspeed_settings import check_settings, is_half, stage_of
from t5vae.training.optimisers import Group, Optimiser, Place

BUCKET = 50_000_000
"""Elements of the gradient that are reduced at once: many enough for a network's full speed, few
enough that reduction begins while the backward pass goes on."""


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
    have at any other stage: a layer is made, and drawn, on the CPU, whose generator gives other
    numbers than an accelerator's, and goes to the device to be dealt.

    Args:
        settings: DeepSpeed's configuration.
        pretrained: whether the model's weights are read, not drawn.
    """
    if stage_of(settings) < 3 or pretrained:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters, Init
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    draw = PreTrainedModel._initialize_weights

    def draw_gathered(self: PreTrainedModel, module: nn.Module, *args: Any) -> None:
        layers = [module, *module.children()]
        weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        with GatheredParameters(weights, modifier_rank=0):
            places = [(weight.device, weight.dtype) for weight in weights]
            for weight in weights:  # other numbers are drawn in half precision, and elsewhere
                weight.data = weight.data.to("cpu", torch.float32)
            draw(self, module, *args)
            for weight, place in zip(weights, places, strict=True):
                weight.data = weight.data.to(*place)

    PreTrainedModel._initialize_weights = draw_gathered
    try:
        with Init(
            config_dict_or_path=settings,
            tensor_overrides=[DeepSpeedTensorOverride.dtype],  # by default the device too
        ):
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
        UserError: if the device cannot compute in this precision, or DeepSpeed refuses its
            configuration.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    check_settings(settings)
    if settings.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise UserError("this device does not compute in fp16: set train.precision to bf16 or fp32")
    for buffer in model.buffers():  # which DeepSpeed leaves where they are if weights are sharded
        buffer.data = buffer.data.to(get_accelerator().current_device_name())
    zero = settings["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    place = Place(
        ranks=dist.get_world_size(),
        on_cpu=get_accelerator().device_name() == "cpu",
        offloaded=offload.get("device") == "cpu",
    )
    optimizer = _optimizer(model, optim, place)
    unpartitioned, half = stage_of(settings) == 0, is_half(settings)
    if unpartitioned and not half:
        _skip_nonfinite(optimizer)
    settings = settings | {"zero_optimization": _reduction(model, stage_of(settings), place) | zero}
    with _zero_at_stage_1():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if unpartitioned and half:
        _undo_first_step(engine.optimizer)
    return engine


@contextlib.contextmanager
def _zero_at_stage_1() -> Iterator[None]:
    """Have DeepSpeed take ZeRO's optimiser at stage 1 where it sums bf16 gradients in fp32 too.

    It would take another for them, which knows no Muon.
    """
    from deepspeed.runtime.constants import BFLOAT16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(self: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str | None:
        chosen = choose(self, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def bucket(stage: int, elements: int) -> int:
    """Of so many elements of the gradient, those that are reduced at once.

    Without ZeRO DeepSpeed's number is fixed. At stage 3 Muon takes as many elements at once, and
    the more matrices there are among them, the more ranks have one to orthogonalise.
    """
    return min({0: 10, 3: 5}.get(stage, 1) * BUCKET, elements)


def _reduction(model: nn.Module, stage: int, place: Place) -> dict[str, Any]:
    """How gradients are reduced, in DeepSpeed's words."""
    elements = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    # More of the buffer that this makes in every step would stay empty.
    reduction: dict[str, Any] = {"reduce_bucket_size": bucket(stage, elements)}
    if stage in (1, 2) and place.ranks > 1 and not place.on_cpu and not place.offloaded:
        reduction["overlap_comm"] = True
    return reduction


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


def _optimizer(model: nn.Module, optim: Optim, place: Place) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, for groups of a model's weights.

    Weight decay falls on matrices alone.

    Raises:
        UserError: where it cannot work in this place.
    """
    kind: type[Optimiser] = find(OPTIMISERS, optim.name)
    optimiser = kind(optim)
    adamw = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    groups: list[Group] = []
    for (own, matrix), weights in grouped(model, kind).items():
        decay = optim.weight_decay if matrix else 0.0
        settings = optimiser.settings() if own else adamw
        groups.append({"params": weights, "own": own, "weight_decay": decay, **settings})
    for group in groups:
        group["full_lr"] = group["lr"]
    return optimiser.build(groups, place)


def grouped(
    model: nn.Module, optimiser: type[Optimiser]
) -> dict[tuple[bool, bool], list[nn.Parameter]]:
    """A model's weights by whether the optimiser takes them for itself, and they are matrices."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for weight in model.parameters():
        dimensions = len(getattr(weight, "ds_shape", weight.shape))
        own = optimiser.takes(embedding=id(weight) in embeddings, dimensions=dimensions)
        groups.setdefault((own, dimensions >= 2), []).append(weight)
    return groups


def backward(engine: Any, loss: Tensor) -> None:
    """The gradient of a micro batch's loss."""
    with phase("backward"):
        engine.backward(loss)


def update(engine: Any) -> None:
    """After each micro batch; after the last one the weights are updated."""
    with phase("optimizer"):
        engine.step()


def gradient_norm(engine: Any, optim: Optim) -> Tensor | float | None:
    """The norm of the last step's gradient before clipping, where DeepSpeed tells it."""
    if not find(OPTIMISERS, optim.name).knows_gradient_norm:
        return None
    return engine.get_global_grad_norm()
