"""An engine's state as fragments of its parameters, however DeepSpeed dealt them out.

A fragment is a range of a flattened parameter, or of one of its moments. Every rank writes those it
holds; whatever ranks and ZeRO stage come later read the ranges that they hold. So nothing is
gathered on saving, nothing is converted on resuming, and nothing is ever unpickled.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t5vae.checkpoint.places import Place, grouped
from t5vae.checkpoint.rank_files import Fragments

WEIGHT, MOMENTUM = "weight", "momentum_buffer"
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Slot(NamedTuple):
    """Where a range of a parameter lies in a flat tensor, in elements."""

    name: str
    start: int
    offset: int
    length: int


class Part(NamedTuple):
    """A tensor that the optimiser updates.

    Attributes:
        master: fp32 weights; the key of the optimiser's state.
        slots: what it is made of.
        momentum_slots: what Muon's momentum is made of.
        places: of all the parameters that it is a rank's share of.
    """

    master: Tensor
    slots: list[Slot]
    momentum_slots: list[Slot]
    places: dict[str, Place]


def fragments(engine: Any) -> dict[str, Tensor]:
    """This rank's share of weights and moments: views, which the next step changes.

    Together the ranks hold every element once.

    Returns:
        1-D tensors by "KIND/PARAMETER/START"; kinds are "weight" (fp32) and the optimiser's.
    """
    found, rank = {}, dist.get_rank()
    for part, kinds in _held(engine):
        for kind, flat in kinds.items():
            for slot in part.momentum_slots if kind == MOMENTUM else part.slots:
                start, length = part.places[slot.name].part(rank)
                low, high = max(slot.start, start), min(slot.start + slot.length, start + length)
                if low < high:
                    at = slot.offset + low - slot.start
                    found[f"{kind}/{slot.name}/{low}"] = flat[at : at + high - low]
    return found


def ranges(engine: Any) -> list[Any]:
    """Where all ranks have their fragments, as a manifest says it (see `places`)."""
    return grouped(
        ({kind: flat.dtype for kind, flat in kinds.items()}, part.places)
        for part, kinds in _held(engine)
    )


def scalars(engine: Any) -> dict[str, Any]:
    """What all ranks share: Adam's count of steps, and fp16's loss scale."""
    steps = {
        float(state["step"])
        for part in _parts(engine)
        if "step" in (state := _base(engine).state.get(part.master, {}))
    }
    scaler = _scaler(engine)
    return {
        "step": max(steps, default=None),
        "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)},
    }


@torch.no_grad()
def load(engine: Any, saved: Fragments, shared: dict[str, Any]) -> None:
    """Set weights and moments to those saved, at whatever ranks and ZeRO stage.

    Args:
        saved: of all ranks that saved.
        shared: as `scalars` gave it.
    """
    base = _base(engine)
    for part in _parts(engine):
        if not part.slots:
            continue
        _fill(part.master, part.slots, WEIGHT, saved)
        kinds = saved.kinds(part.slots[0].name) - {WEIGHT}
        state = base.state.setdefault(part.master, {}) if kinds else {}
        for kind in kinds:
            slots = part.momentum_slots if kind == MOMENTUM else part.slots
            if kind not in state:
                state[kind] = torch.zeros_like(part.master.detach())
                if slots is not part.slots:
                    size = sum(slot.length for slot in slots)
                    dtype = saved.dtype(kind, slots[0].name)
                    state[kind] = state[kind].new_zeros(size, dtype=dtype)
            _fill(state[kind], slots, kind, saved)
        if kinds - {MOMENTUM} and shared["step"] is not None:
            adam = getattr(base, "aux_optimizer", base)  # Muon's for the rest, or none
            counts_in_tensors = type(adam).__module__.startswith("torch.optim")
            state["step"] = (torch.tensor if counts_in_tensors else int)(shared["step"])
    for name, value in shared["loss_scale"].items():
        if hasattr(_scaler(engine), name):
            setattr(_scaler(engine), name, value)
    _refresh(engine)


@torch.no_grad()
def load_weights(engine: Any, saved: Fragments) -> None:
    """Set the weights alone to those saved."""
    for part in _parts(engine):
        _fill(part.master, part.slots, WEIGHT, saved)
    _refresh(engine)


@torch.no_grad()
def fill_model(model: nn.Module, saved: Fragments) -> None:
    """Set a plain model's parameters to the weights saved.

    Raises:
        ValueError: it has other parameters.
    """
    flat = {name: parameter.view(-1) for name, parameter in model.named_parameters()}
    held = {name: saved.length(kind, name) for kind, name in saved.contents() if kind == WEIGHT}
    if held != {name: parameter.numel() for name, parameter in flat.items()}:
        raise ValueError("the weights saved are those of other parameters")
    for name, start, length in saved.file_by_file(WEIGHT):
        flat[name][start : start + length].copy_(saved.read(WEIGHT, name, start, length))


def _held(engine: Any) -> Iterator[tuple[Part, dict[str, Tensor]]]:
    """What this rank's optimiser updates, and what it has of it by kind, flattened."""
    state = _base(engine).state
    for part in _parts(engine):
        kinds = {WEIGHT: part.master, **state.get(part.master, {})}
        yield (
            part,
            {
                kind: tensor.detach().view(-1)
                for kind, tensor in kinds.items()
                if torch.is_tensor(tensor) and tensor.ndim  # not the step
            },
        )


def _parts(engine: Any) -> Iterator[Part]:
    """What this rank's optimiser updates, at each of DeepSpeed's stages."""
    name_of = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    rank = dist.get_rank()
    if stage == 3:
        for master, parameters in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
        ):
            slots, places, offset = [], {}, 0
            for parameter in parameters:
                name = name_of[parameter]
                places[name] = Place(0, parameter.ds_numel, parameter.partition_numel())
                start, length = places[name].part(rank)
                slots.append(Slot(name, start, offset, length))
                offset += places[name].size
            yield Part(master, slots, slots, places)
    elif stage:
        for master, parameters, offsets, touched in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.params_in_partition,
            strict=True,
        ):
            size = master.numel()
            places = {
                name_of[parameter]: Place(offset, parameter.numel(), size)
                for parameter, offset in zip(parameters, offsets, strict=True)
            }
            slots = []
            for name, place in places.items():
                start, length = place.part(rank)
                if length:
                    slots.append(Slot(name, start, place.offset + start - rank * size, length))
            # Unless it is offloaded, Muon's momentum is that of whole matrices.
            whole = getattr(parameters[0], "use_muon", False) and not optimizer.cpu_offload
            momentum_slots = _whole(touched, name_of) if whole else slots
            yield Part(master, slots, momentum_slots, places)
    else:
        world = dist.get_world_size()
        for master, parameter in _unpartitioned(engine):
            name, elements = name_of[parameter], parameter.numel()
            slots = [Slot(name, 0, 0, elements)]
            yield Part(master, slots, slots, {name: Place(0, elements, -(-elements // world))})


def _whole(parameters: list[Tensor], name_of: dict[Tensor, str]) -> list[Slot]:
    slots, offset = [], 0
    for parameter in parameters:
        slots.append(Slot(name_of[parameter], 0, offset, parameter.numel()))
        offset += parameter.numel()
    return slots


def _unpartitioned(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Without ZeRO: each fp32 weight with its parameter, which in fp32 is the same."""
    optimizer = engine.optimizer
    masters = [group["params"] for group in optimizer.param_groups]
    for group, parameters in zip(masters, getattr(optimizer, "fp16_groups", masters), strict=True):
        yield from zip(group, parameters, strict=True)


def _base(engine: Any) -> Any:
    """The optimiser itself, inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _scaler(engine: Any) -> Any:
    """What holds the loss scale; None where there is none."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", getattr(optimizer, "loss_scaler", None))


def _fill(tensor: Tensor, slots: list[Slot], kind: str, saved: Fragments) -> None:
    flat = tensor.detach().view(-1)
    for slot in slots:
        piece = saved.read(kind, slot.name, slot.start, slot.length)
        flat[slot.offset : slot.offset + slot.length].copy_(piece)


def _refresh(engine: Any) -> None:
    """Make the model's weights those of the optimiser."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for master, group in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True
        ):
            offset = 0
            for partition in group:
                partition.data.copy_(master[offset : offset + partition.ds_numel])
                offset += partition.ds_numel
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    else:
        for master, parameter in _unpartitioned(engine):
            parameter.data.copy_(master)
