"""Sums over pairs of codes by tiles, on any device: memory O(tile + (b + N) D).

Shapes: b rows x, N columns y, D latent size, E = D + 2; r x c a tile of pairs.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from t5vae.objective.kernels import Gaussians, InverseMultiquadric, Kernel

FARTHEST = 64.0  # times the kernel's reach: where |x|^2 is more, fp32 loses what the kernel sees


def pair_sum(
    x_BD: Tensor, y_ND: Tensor, kernel: Kernel, centre_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum phi over all pairs, and what pulls each x; half the work where `y_ND` is `x_BD`.

    Distances come from a product, so their error grows with the norms: in fp32 about 1e-7 |x|^2.

    Args:
        x_BD: float32 or float64 [b, D].
        y_ND: like x, [N, D].
        kernel: phi; P = -phi'.
        centre_D: like x, [D], taken from all for accuracy: a common shift changes nothing.

    Returns:
        float64 scalar: sum_ij (phi(s_ij) - 1); like x: sum_j P(s_ij) (y_j - x_i).
    """
    alone = y_ND is x_BD
    height, width = _tile_size(x_BD, y_ND)
    unit, slope_unit, terms = _units(kernel)
    bounds = (0, None) if unit > 0 else (None, 0)

    def right(y_cD: Tensor) -> tuple[Tensor, Tensor]:
        if centre_D is not None:
            y_cD = y_cD - centre_D
        norm_c1 = _squared_norms(y_cD)
        return y_cD, torch.cat([y_cD, torch.ones_like(norm_c1), unit * norm_c1], 1)

    whole = None  # where each tile of columns is used once
    if alone:
        x_BD, _ = whole = right(y_ND)
    else:
        if centre_D is not None:
            x_BD = x_BD - centre_D
        if len(x_BD) > height:
            whole = right(y_ND)
    # One product of augmented rows gives unit * |x - y|^2.
    x_norm_B1 = _squared_norms(x_BD)
    left_BE = torch.cat([-2 * unit * x_BD, unit * x_norm_B1, torch.ones_like(x_norm_B1)], 1)
    pull_BD, weight_B = torch.zeros_like(x_BD), torch.zeros_like(x_BD[:, 0])
    once, twice = [x_BD.new_zeros(())], [x_BD.new_zeros(())]
    buffers = x_BD.new_empty(3, height * width)
    for rows, columns in _tiles(len(x_BD), len(y_ND), height, width, alone):
        x_rD = x_BD[rows]
        y_cD, right_cE = (part[columns] for part in whole) if whole else right(y_ND[columns])
        pairs = len(x_rD) * len(y_cD)
        s_rc, slope_rc, spare_rc = buffers[:, :pairs].view(3, len(x_rD), len(y_cD))
        torch.mm(left_BE[rows], right_cE.T, out=s_rc)
        s_rc.clamp_(*bounds)  # what is nearly 0 can be negative, where a kernel has a pole
        sums = _phi(kernel, s_rc, slope_rc, spare_rc)
        pull_BD[rows].addmm_(slope_rc, y_cD)
        weight_B[rows] += slope_rc.sum(1)
        if alone and rows != columns:
            pull_BD[columns].addmm_(slope_rc.T, x_rD)
            weight_B[columns] += slope_rc.sum(0)
            twice += sums
        else:
            once += sums
    total = torch.stack(once).sum(dtype=torch.float64)
    total += 2 * torch.stack(twice).sum(dtype=torch.float64)
    if terms > 1:
        total = total / terms - len(x_BD) * len(y_ND)
    return total, pull_BD.addcmul_(weight_B[:, None], x_BD, value=-1).mul_(slope_unit)


def exact_pair_sum(
    x_BD: Tensor, y_ND: Tensor, kernel: Kernel, centre_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`pair_sum` of float32 codes in float64."""
    x_64 = x_BD.double()
    y_64 = x_64 if y_ND is x_BD else y_ND.double()
    total, pull_BD = pair_sum(x_64, y_64, kernel, None if centre_D is None else centre_D.double())
    return total, pull_BD.float()


def is_far(z_ND: Tensor, kernel: Kernel, *, centred: bool) -> bool:
    """Whether some codes are so far out that fp32 loses what the kernel sees.

    That is where |z|^2 is many times the squared distance at which the kernel falls.

    Args:
        centred: as codes are that are compared with each other alone.
    """
    if not len(z_ND):
        return False
    if centred:
        z_ND = z_ND - z_ND.mean(0)
    return bool(_squared_norms(z_ND).max() > FARTHEST * reach(kernel))


def _squared_norms(x_BD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BD, dim=1, keepdim=True).square_()


def reach(kernel: Kernel) -> float:
    """The squared distance at which the narrowest part of a kernel falls."""
    if isinstance(kernel, Gaussians):
        return 1 / (kernel.gamma * 2 ** (kernel.octaves - 1))
    return min(kernel.scales)


def _tile_size(x_BD: Tensor, y_ND: Tensor) -> tuple[int, int]:
    """Large enough that calls cost little, small enough for a cache; square where x is y."""
    if x_BD.device.type == "cpu":
        threads = min(torch.get_num_threads(), 3)
        least, most = 256 * threads, 384 * threads
    else:
        least, most = 1024, 4096
    if y_ND is x_BD:
        side = min(most, max(least, len(x_BD) // 4))
        return side, side
    return max(1, min(most, len(x_BD))), min(2 * most, len(y_ND))


def _tiles(
    rows: int, columns: int, height: int, width: int, alone: bool
) -> Iterator[tuple[slice, slice]]:
    """All tiles, or those on and above the diagonal."""
    for row in range(0, rows, height):
        for column in range(row if alone else 0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


def _units(kernel: Kernel) -> tuple[float, float, int]:
    """What squared distances are multiplied by before `_phi`, what its slopes are multiplied by
    to be P, and of how many terms phi is the mean."""
    if isinstance(kernel, InverseMultiquadric):
        return 1.0, 1 / len(kernel.scales), len(kernel.scales)
    return -kernel.gamma / math.log(2), kernel.gamma / kernel.octaves, kernel.octaves


def _phi(kernel: Kernel, s_rc: Tensor, slope_rc: Tensor, spare_rc: Tensor) -> list[Tensor]:
    """Fill `slope_rc`; the sums over a tile of phi's terms, or of phi - 1 where it has one term.

    `s_rc` and `spare_rc` are overwritten. The passes over the tile are what this costs.
    """
    if isinstance(kernel, InverseMultiquadric):
        sums = []
        one = s_rc.new_ones(())
        slope_rc.zero_()
        for scale in kernel.scales:
            torch.add(one, s_rc, alpha=1 / scale, out=spare_rc).reciprocal_()
            sums.append(spare_rc.sum())
            slope_rc.addcmul_(spare_rc, spare_rc, value=1 / scale)
        return sums
    if kernel.octaves == 1:  # perhaps nearly flat: then the digits are in phi - 1
        sums = [torch.mul(s_rc, math.log(2), out=spare_rc).expm1_().sum()]
        torch.exp2(s_rc, out=slope_rc)
        return sums
    u_rc = s_rc.exp2_()  # each octave is the square of the one before
    torch.square(u_rc, out=spare_rc)
    torch.add(u_rc, spare_rc, alpha=2, out=slope_rc)
    sums = [u_rc.sum(), spare_rc.sum()]
    for octave in range(2, kernel.octaves):
        slope_rc.add_(spare_rc.square_(), alpha=2**octave)
        sums.append(spare_rc.sum())
    return sums
