"""What all ranks find, sum or refuse together: their bookkeeping, over gloo on the CPU.

It has a process group of its own, so that none of it waits for tensors under way in the default one
(NCCL's where there is an accelerator), nor is mistaken for them.
"""

import hashlib
import json
import weakref
from collections.abc import Callable
from datetime import timedelta
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

_made: weakref.ref[dist.ProcessGroup] | None = None


def _group() -> dist.ProcessGroup | None:
    """That of the bookkeeping; None for the default one, where that was joined without it."""
    return _made() if _made else None


def start_bookkeeping(timeout: float) -> None:
    """Connect the ranks for their bookkeeping; all of the default process group call it together.

    Leaving the default group ends this one too.

    Args:
        timeout: seconds that ranks wait for each other, here and in each call.

    Raises:
        RuntimeError: torch's, where a rank does not come.
    """
    global _made
    group = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=timeout), group_desc="bookkeeping"
    )
    _made = weakref.ref(group)  # torch alone keeps it, until the default group is left


def gather_objects(own: Result) -> list[Result]:
    """What each rank has, in their order, on all ranks; it must be fit for pickle."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, _group())
    return found


def raise_together(problem: UserError | StorageError | None) -> None:
    """Raise on all ranks what any rank has to complain of; all ranks call it.

    Raises:
        SharedError, SharedStorageError: the first rank's that has one, with its name and host
            unless all have one.
    """
    found = gather_objects((host_name(), _told(problem)))
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
    everyone = gather_objects(found)
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
    everyone = gather_objects((host_name(), own))
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
    dist.all_reduce(total, group=_group())
    return total.tolist()


def all_max(*values: float) -> list[float]:
    """The largest of each value over the ranks, in fp64; a process without a group has its own."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, _group())
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
    dist.broadcast_object_list(found, 0, _group())
    if found[1]:
        text, weather = found[1]
        raise (SharedStorageError if weather else SharedError)(text)
    return found[0]
