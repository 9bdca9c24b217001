"""The codes of all ranks, gathered without gradient while the decoder runs.

Shapes: b codes of this rank, N codes of the global batch, D latent size.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Gathering:
    """A gather under way: codes beside their weights, [N, D + 1], as soon as `work` has waited.

    One process alone gathers nothing.
    """

    z_BD: Tensor
    weights_B: Tensor
    group: dist.ProcessGroup | None
    gathered_NE: Tensor | None = None
    work: dist.Work | None = None

    def own(self) -> Tensor:
        """This rank's codes that count, float32, without gradient."""
        return _rows_that_count(self.z_BD.detach().float(), self.weights_B > 0)

    def everyone(self) -> Tensor:
        """Wait for the codes of all ranks: those that count, float32 [N, D], without gradient."""
        if self.work is None or self.gathered_NE is None:
            return self.own()
        self.work.wait()
        return _rows_that_count(self.gathered_NE[:, :-1], self.gathered_NE[:, -1] > 0)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of rows that every rank has."""
        if self.work is None:
            return rows
        return rows.tensor_split(dist.get_world_size(self.group))[dist.get_rank(self.group)]


def start_gather(
    z_BD: Tensor,
    *,
    weights_B: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    equal_rows: bool = False,
) -> "Gathering":
    """Start gathering the codes, so that they travel while the decoder runs.

    Nothing here waits for the codes to be computed, so codes that are not finite pass.

    Args:
        z_BD: this rank's codes, floating, [b, D]; b may differ between ranks.
        weights_B: [b], 0 for rows that do not count, 1 for others, the default.
        group: the data-parallel ranks; default all, or this process alone where none is set up.
        equal_rows: every rank has b rows; saves asking how many each has.

    Raises:
        ValueError: for codes that are not [b, D] with b, D >= 1.
    """
    if z_BD.ndim != 2 or 0 in z_BD.shape:
        raise ValueError(f"codes have shape {list(z_BD.shape)}; expected [rows, dimensions]")
    if weights_B is None:
        weights_B = torch.ones(len(z_BD), device=z_BD.device)
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world == 1:
        return Gathering(z_BD, weights_B, group)
    local_BE = torch.cat([z_BD.detach().float(), weights_B.detach().float()[:, None]], dim=1)
    most = len(z_BD) if equal_rows else _most_rows(z_BD, group)
    local_BE = torch.nn.functional.pad(local_BE, (0, 0, 0, most - len(z_BD)))
    gathered_NE = local_BE.new_empty(world * most, local_BE.shape[1])
    work = dist.all_gather(list(gathered_NE.chunk(world)), local_BE, group=group, async_op=True)
    return Gathering(z_BD, weights_B, group, gathered_NE, work)


def _rows_that_count(codes: Tensor, counts: Tensor) -> Tensor:
    return codes if counts.all() else codes[counts]


def _most_rows(z_BD: Tensor, group: dist.ProcessGroup | None) -> int:
    rows = torch.tensor(len(z_BD), device=z_BD.device)
    dist.all_reduce(rows, dist.ReduceOp.MAX, group=group)
    return int(rows)
