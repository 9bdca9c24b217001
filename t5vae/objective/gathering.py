"""The codes of all ranks, gathered without gradient while the decoder runs.

Which rows count is known to the host, so that it need not wait for an accelerator.

Shapes: b codes of this rank, N codes of the global batch, D latent size, W ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from t5vae.common.devices import sent

# One call for all ranks' rows at once; torch 2.13 gave it a new name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Gathering:
    """A gather under way. One process alone gathers nothing.

    Attributes:
        z_BD: this rank's codes, with gradient.
        group: of the ranks.
        own_rows: int64, which of `z_BD` count; None for all.
        every_row: int64, which of `gathered_ND` count; None for all.
        gathered_ND: the codes of all ranks as soon as `work` has waited, float32.
    """

    z_BD: Tensor
    group: dist.ProcessGroup | None
    own_rows: Tensor | None
    every_row: Tensor | None
    gathered_ND: Tensor | None = None
    work: dist.Work | None = None

    def own(self) -> Tensor:
        """This rank's codes that count, float32, without gradient."""
        return _rows(self.z_BD.detach().float(), self.own_rows)

    def everyone(self) -> Tensor:
        """Wait for the codes of all ranks: those that count, float32 [N, D], without gradient."""
        if self.work is None or self.gathered_ND is None:
            return self.own()
        self.work.wait()
        return _rows(self.gathered_ND, self.every_row)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of rows that every rank has."""
        if self.work is None:
            return rows
        return rows.tensor_split(dist.get_world_size(self.group))[dist.get_rank(self.group)]

    def spread(self, own: Tensor) -> Tensor:
        """Rows like those of `own` among all of this rank's, where the others are 0."""
        if self.own_rows is None:
            return own
        return torch.zeros_like(self.z_BD, dtype=own.dtype).index_copy_(0, self.own_rows, own)


def start_gather(
    z_BD: Tensor, *, counting_WB: np.ndarray | None = None, group: dist.ProcessGroup | None = None
) -> Gathering:
    """Start gathering the codes, so that they travel while the decoder runs.

    Nothing here waits for the codes to be computed, so codes that are not finite pass.

    Args:
        z_BD: this rank's codes, floating, [b, D]; without `counting_WB` every rank has b.
        counting_WB: bool [W, most], which rows of each rank count, for ranks of up to `most` rows;
            see `rows_that_count`. Default: all.
        group: the data-parallel ranks; default all, or this process alone where none is set up.

    Raises:
        ValueError: for codes that are not [b, D] with b, D >= 1.
    """
    _check_shape(z_BD)
    world, rank = _place(group)
    own_rows = every_row = None
    if counting_WB is not None and not counting_WB.all():
        own_rows = _where(counting_WB[rank], z_BD.device)
        every_row = _where(counting_WB, z_BD.device)
    if world == 1:
        return Gathering(z_BD, group, own_rows, every_row)
    local_BD = z_BD.detach().float()
    if counting_WB is not None:
        short = counting_WB.shape[1] - len(z_BD)
        local_BD = torch.nn.functional.pad(local_BD, (0, 0, 0, short))
    gathered_ND = local_BD.new_empty(world * len(local_BD), local_BD.shape[1])
    work = all_gather(gathered_ND, local_BD.contiguous(), group=group, async_op=True)
    return Gathering(z_BD, group, own_rows, every_row, gathered_ND, work)


def rows_that_count(
    z_BD: Tensor, weights_B: Tensor | None, group: dist.ProcessGroup | None = None
) -> np.ndarray:
    """Ask all ranks which rows count: `start_gather`'s `counting_WB`.

    Args:
        z_BD: this rank's codes, [b, D]; b may differ between ranks.
        weights_B: [b], 0 for rows that do not count, 1 for others, the default.
        group: as `start_gather`'s.

    Raises:
        ValueError: as `start_gather`.
    """
    _check_shape(z_BD)
    counts_B = z_BD.new_ones(len(z_BD), dtype=torch.bool) if weights_B is None else weights_B > 0
    world, _ = _place(group)
    if world == 1:
        return counts_B.cpu().numpy()[None]
    most = torch.tensor(len(z_BD), device=z_BD.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    counts_B = torch.nn.functional.pad(counts_B.to(torch.uint8), (0, int(most) - len(z_BD)))
    counting_N = counts_B.new_empty(world * len(counts_B))
    all_gather(counting_N, counts_B, group=group)
    return counting_N.view(world, -1).bool().cpu().numpy()


def _check_shape(z_BD: Tensor) -> None:
    if z_BD.ndim != 2 or 0 in z_BD.shape:
        raise ValueError(f"codes have shape {list(z_BD.shape)}; expected [rows, dimensions]")


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """How many ranks there are, and which this is."""
    if not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def _where(true: np.ndarray, device: torch.device) -> Tensor:
    return sent(torch.from_numpy(np.flatnonzero(true)), device)


def _rows(codes: Tensor, which: Tensor | None) -> Tensor:
    return codes if which is None else codes.index_select(0, which)
