"""What all ranks of a process group find, sum or refuse together, over gloo on the CPU."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from t5vae.cluster.errors import SharedError, SharedStorageError
from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import StorageError, UserError
from t5vae.common.storage import patiently

Result = TypeVar("Result")
_Told = tuple[str, bool]


def raise_together(problem: UserError | StorageError | None) -> None:
    """Raise on all ranks what any rank has to complain of; all ranks call it.

    Raises:
        SharedError, SharedStorageError: the first rank's that has one, with its name and host
            unless all have one.
    """
    found: list[tuple[str, _Told | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(found, (host_name(), _told(problem)))
    broken = {rank: (host, told) for rank, (host, told) in enumerate(found) if told}
    for rank, (host, (text, weather)) in broken.items():
        everywhere = len(broken) == len(found)
        named = text if everywhere else f"rank {rank} of {len(found)} on {host}: {text}"
        raise (SharedStorageError if weather else SharedError)(named)


def _told(problem: Exception | None) -> _Told | None:
    """What an error says, and whether it is the storage's."""
    return None if problem is None else (str(problem), isinstance(problem, StorageError))


def check_shared(file: Path) -> None:
    """Refuse a file system that not all ranks share; all of them call it.

    Args:
        file: that rank 0 has just written, with content like no other.

    Raises:
        SharedError: naming those that do not find it.
        StorageError: on a rank whose storage failed for minutes.
    """
    try:
        found = patiently(file.read_text, str(file))
    except FileNotFoundError:
        found = None
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    elsewhere = [str(rank) for rank, own in enumerate(everyone) if own != everyone[0]]
    if elsewhere:
        raise SharedError(
            f"rank {', '.join(elsewhere)} of {len(everyone)} does not find what rank 0 wrote in "
            f"{file.parent}: set run.output_dir to a folder that all hosts share"
        )


def check_same(facts: dict[str, Any]) -> None:
    """Refuse ranks that do not train the same, as with copies of a dataset that differ.

    Args:
        facts: what all ranks must agree in, fit for JSON.

    Raises:
        SharedError: naming the first fact that differs, and those who have it otherwise.
    """
    own = {name: _digest(value) for name, value in facts.items()}
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(everyone, (host_name(), own))
    for name, digest in everyone[0][1].items():
        others = [rank for rank, (_, theirs) in enumerate(everyone) if theirs[name] != digest]
        if others:
            hosts = ", ".join({everyone[rank][0]: 0 for rank in others})
            raise SharedError(
                f"rank {', '.join(map(str, others))} of {len(everyone)} on {hosts} differs from "
                f"rank 0 on {everyone[0][0]} in {name.replace('_', ' ')}: give all hosts the same"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def all_sum(*values: float) -> list[float]:
    """Sum each value over the ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def all_max(*values: float) -> list[float]:
    """The largest of each value over the ranks, in fp64; a process without a group has its own."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(decide: Callable[[], Result]) -> Result:
    """What rank 0 decides, on all ranks; all of them call it together.

    Raises:
        SharedError, SharedStorageError: what it has to complain of.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = decide()
        except (UserError, StorageError) as error:
            found[1] = _told(error)
    dist.broadcast_object_list(found, src=0)
    if found[1]:
        text, weather = found[1]
        raise (SharedStorageError if weather else SharedError)(text)
    return found[0]
