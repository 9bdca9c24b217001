"""An engine's state as fragments of its parameters, however DeepSpeed dealt them out.

A fragment is a range of a flattened parameter, or of one of its moments. Every rank writes those it
holds; whatever ranks and ZeRO stage come later read the ranges that they hold. So nothing is
gathered on saving, nothing is converted on resuming, and nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t5vae.checkpoint.files import ABSENT, Result, reach
from t5vae.common.errors import UserError, first_line

WEIGHT, MOMENTUM = "weight", "momentum_buffer"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


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
    """

    master: Tensor
    slots: list[Slot]
    momentum_slots: list[Slot]


def fragments(engine: Any) -> dict[str, Tensor]:
    """This rank's share of weights and moments: views, which the next step changes.

    Together the ranks hold every element once.

    Returns:
        1-D tensors by "KIND/PARAMETER/START"; kinds are "weight" (fp32) and the optimiser's.
    """
    found = {}
    parts = list(_parts(engine))
    owned = _owned(engine, parts)
    state = _base(engine).state
    for part in parts:
        for kind, tensor in {WEIGHT: part.master, **state.get(part.master, {})}.items():
            if not torch.is_tensor(tensor) or not tensor.ndim:
                continue  # the step
            flat = tensor.detach().view(-1)
            for slot in part.momentum_slots if kind == MOMENTUM else part.slots:
                low = max(slot.start, owned[slot.name][0])
                high = min(slot.start + slot.length, owned[slot.name][1])
                if low < high:
                    at = slot.offset + low - slot.start
                    found[f"{kind}/{slot.name}/{low}"] = flat[at : at + high - low]
    return found


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
        "loss_scale": {
            name: getattr(scaler, name)
            for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            if hasattr(scaler, name)
        },
    }


@torch.no_grad()
def load(engine: Any, saved: "Fragments", shared: dict[str, Any]) -> None:
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
def load_weights(engine: Any, saved: "Fragments") -> None:
    """Set the weights alone to those saved."""
    for part in _parts(engine):
        _fill(part.master, part.slots, WEIGHT, saved)
    _refresh(engine)


@torch.no_grad()
def fill_model(model: nn.Module, saved: "Fragments") -> None:
    """Set a plain model's parameters to the weights saved."""
    for name, parameter in model.named_parameters():
        weight = saved.read(WEIGHT, name, 0, parameter.numel())
        parameter.copy_(weight.view_as(parameter))


class Piece(NamedTuple):
    """A range of a flattened parameter, or of its moment, in a file.

    Attributes:
        start, length: of the range, in elements.
        offset: of its first byte.
    """

    start: int
    length: int
    dtype: torch.dtype
    path: Path
    offset: int


class Fragments:
    """The fragments in files of all ranks, read by parameter and range.

    A file is opened for each read and closed again: a mapped one ends the process where the storage
    fails.

    Args:
        paths: safetensors files.

    Attributes:
        metadata: of each file.

    Raises:
        StorageError: here and in reads, where the storage failed for minutes.
        UserError: likewise, for files that are damaged, gone, or may not be read.
    """

    def __init__(self, paths: list[Path]):
        self.metadata: list[dict[str, str]] = []
        self.ranges: dict[tuple[str, str], list[Piece]] = {}
        for path in paths:
            metadata, pieces = _contents(path)
            self.metadata.append(metadata)
            for key, piece in pieces:
                self.ranges.setdefault(key, []).append(piece)

    def kinds(self, name: str) -> set[str]:
        """Of what is there of a parameter."""
        return {kind for kind, parameter in self.ranges if parameter == name}

    def length(self, kind: str, name: str) -> int:
        """Elements of a whole parameter, or of its moment."""
        return max(piece.start + piece.length for piece in self.ranges[kind, name])

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self.ranges[kind, name][0].dtype

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """A range of a flattened parameter, or of its moment, of shape [length].

        Raises:
            ValueError: where elements of it are in no file.
        """
        read = torch.empty(length, dtype=self.dtype(kind, name))
        covered = 0
        for piece in self.ranges[kind, name]:
            low = max(start, piece.start)
            high = min(start + length, piece.start + piece.length)
            if low < high:
                content = read[low - start : high - start].view(torch.uint8).numpy()
                at = piece.offset + (low - piece.start) * piece.dtype.itemsize
                _read(piece.path, at, memoryview(content))
                covered += high - low
        if covered != length:
            raise ValueError(f"{kind} of {name}: {covered} of {length} elements are saved")
        return read


def _contents(path: Path) -> tuple[dict[str, str], list[tuple[tuple[str, str], Piece]]]:
    """A safetensors file's metadata, and its pieces with their kind and parameter.

    Raises:
        UserError: it is no such file, or names what it does not hold.
    """
    size = _reach(path, path.stat).st_size
    pieces = []
    try:
        length = int.from_bytes(_bytes(path, 0, 8), "little")
        if length > min(size - 8, LARGEST_HEADER):
            raise ValueError("a header of another file")
        header, first = json.loads(_bytes(path, 8, length)), 8 + length
        metadata = header.pop("__metadata__", {})
        for key, entry in header.items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            begin, end = map(int, entry["data_offsets"])
            dtype, elements = DTYPES[entry["dtype"]], math.prod(map(int, entry["shape"]))
            whole = end - begin == elements * dtype.itemsize
            if not (whole and 0 <= begin <= end <= size - first):
                raise ValueError(f"{key} lies elsewhere")
            piece = Piece(int(start), elements, dtype, path, first + begin)
            pieces.append(((kind, name), piece))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise _damaged(path) from None
    return metadata, pieces


def _bytes(path: Path, offset: int, length: int) -> bytes:
    content = bytearray(length)
    _read(path, offset, memoryview(content))
    return bytes(content)


def _read(path: Path, offset: int, into: memoryview) -> None:
    """Fill a buffer from a file, which is opened for it; again where the storage fails."""

    def attempt() -> bool:
        descriptor, at = os.open(path, os.O_RDONLY), 0
        try:
            while at < len(into) and (count := os.preadv(descriptor, [into[at:]], offset + at)):
                at += count
        finally:
            os.close(descriptor)
        return at == len(into)

    if not _reach(path, attempt):
        raise _damaged(path)


def _reach(path: Path, attempt: Callable[[], Result]) -> Result:
    try:
        return reach(path, attempt)
    except ABSENT as error:
        raise UserError(f"cannot reach {path}: {first_line(error)}") from None


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it is no whole safetensors file; restore it from a copy, or remove "
        "its checkpoint to go on from the one before"
    )


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file, synced to the disk; its size in bytes and sha256.

    The library's own writer first copies everything into strings, and halts other threads
    meanwhile; here one tensor at a time is copied, and hashed as it is written.

    Raises:
        OSError: if it cannot be written.
    """
    largest_first = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in largest_first:  # so that every tensor is aligned to its elements
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            file.write(content)
            digest.update(content)
        for name in largest_first:
            content = tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


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
            slots, offset = [], 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = min(rank * size, parameter.ds_numel)
                length = min(size, parameter.ds_numel - start)
                slots.append(Slot(name_of[parameter], start, offset, length))
                offset += size
            yield Part(master, slots, slots)
    elif stage:
        for master, parameters, offsets, touched in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.params_in_partition,
            strict=True,
        ):
            begin = rank * master.numel()
            slots = []
            for parameter, offset in zip(parameters, offsets, strict=True):
                start = max(begin - offset, 0)
                stop = min(begin + master.numel() - offset, parameter.numel())
                if start < stop:
                    at = offset + start - begin
                    slots.append(Slot(name_of[parameter], start, at, stop - start))
            # Unless it is offloaded, Muon's momentum is that of whole matrices.
            whole = getattr(parameters[0], "use_muon", False) and not optimizer.cpu_offload
            yield Part(master, slots, _whole(touched, name_of) if whole else slots)
    else:
        for master, parameter in _unpartitioned(engine):
            slots = [Slot(name_of[parameter], 0, 0, parameter.numel())]
            yield Part(master, slots, slots)


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


def _owned(engine: Any, parts: list[Part]) -> dict[str, tuple[int, int]]:
    """The range of each parameter that this rank answers for."""
    slots = [slot for part in parts for slot in part.slots]
    if engine.zero_optimization_stage():
        return {slot.name: (slot.start, slot.start + slot.length) for slot in slots}
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        slot.name: (slot.length * rank // world, slot.length * (rank + 1) // world)
        for slot in slots
    }


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
