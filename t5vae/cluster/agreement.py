"""What all ranks of a process group find, sum or refuse together."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from t5vae.cluster.scheduler import host_name
from t5vae.common.errors import UserError


def raise_together(problem: UserError | None) -> None:
    """Raise on all ranks what any rank has to complain of; all ranks call it.

    Raises:
        UserError: the first rank's that has one, with its host where others have none.
    """
    found: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(found, (host_name(), None if problem is None else str(problem)))
    broken = {host: text for host, text in reversed(found) if text is not None}
    if broken:
        host, text = next(reversed(broken.items()))
        raise UserError(text if {host for host, _ in found} == set(broken) else f"{host}: {text}")


def check_shared(file: Path) -> None:
    """Refuse a file system that not all ranks share; all of them call it.

    Args:
        file: that rank 0 has just written, with content like no other.

    Raises:
        UserError: on all ranks, naming those that do not find it.
    """
    try:
        found = file.read_text()
    except OSError:
        found = None
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    elsewhere = [str(rank) for rank, own in enumerate(everyone) if own != everyone[0]]
    if elsewhere:
        raise UserError(
            f"rank {', '.join(elsewhere)} of {len(everyone)} does not find what rank 0 wrote in "
            f"{file.parent}: set run.output_dir to a folder that all hosts share"
        )


def all_sum(*values: float, device: torch.device) -> list[float]:
    """Sum each value over the ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_max(*values: float, device: torch.device) -> list[float]:
    """The largest of each value over the ranks, in fp64; a process without a group has its own."""
    if not dist.is_initialized():
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def from_first(value: Any) -> Any:
    """Rank 0's value, on all ranks."""
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]
