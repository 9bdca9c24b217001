"""Distances between codes: the nearest ones, and which repeat others.

A distance is |a - b| / sqrt(D), the root mean square over coordinates: in units of the prior's
standard deviation, the same whatever D is. Two draws of N(0, I) lie about 1.41 apart.

Shapes: Q queries, N codes, D latent size, K nearest, R rows of a block.
"""

import torch
from torch import Tensor

BLOCK = 2**24  # distances in memory at a time
ROWS = 1024
FINEST = 1e-3


def distance(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Distances of rows, float32 [N]; shapes broadcast."""
    return (a_ND - b_ND).square().mean(-1).sqrt()


def nearest(queries_QD: Tensor, codes_ND: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n nearest codes of each query, by exhaustive search.

    Returns:
        Distances, float32 [Q, K], rising, and rows, int64 [Q, K], with K = min(n, N).
    """
    count = min(n, len(codes_ND))
    found_QK = torch.full((len(queries_QD), 0), torch.inf)
    rows_QK = torch.zeros(len(queries_QD), 0, dtype=torch.long)
    rows = BLOCK // max(1, len(queries_QD)) + 1
    for begin in range(0, len(codes_ND), rows):
        block_RD = codes_ND[begin : begin + rows]
        candidates = _squares(queries_QD, block_RD).topk(min(count, len(block_RD)), largest=False)
        # The products above are off by rounding where two codes nearly coincide.
        exact_QK = distance(queries_QD[:, None], block_RD[candidates.indices])
        found_QK, best_QK = torch.cat([found_QK, exact_QK], 1).sort(dim=1)
        rows_QK = torch.cat([rows_QK, candidates.indices + begin], 1).gather(1, best_QK)
        found_QK, rows_QK = found_QK[:, :count], rows_QK[:, :count]
    return found_QK, rows_QK


def originals(codes_ND: Tensor, radius: float) -> Tensor:
    """Go through codes in order; one within `radius` of an earlier one that was kept is a copy.

    Codes nearer than 1e-3 are not told apart, whatever the radius: rounding moves them as far.

    Returns:
        int64 [N]: a copy's original, the nearest one of an earlier block or the first of its own;
        a kept code's own row.
    """
    original_N = torch.arange(len(codes_ND))
    limit = max(radius, FINEST) ** 2 * codes_ND.shape[1]
    for begin in range(0, len(codes_ND), ROWS):
        rows_R = torch.arange(begin, min(begin + ROWS, len(codes_ND)))
        block_RD, original_R = codes_ND[rows_R], original_N[rows_R]
        kept_K = (original_N[:begin] == torch.arange(begin)).nonzero()[:, 0]
        least_R = torch.full((len(rows_R),), torch.inf)
        for some_K in kept_K.split(BLOCK // ROWS) if len(kept_K) else ():
            square_R, at_R = _squares(block_RD, codes_ND[some_K]).min(1)
            closer_R = (square_R <= limit) & (square_R < least_R)
            least_R[closer_R] = square_R[closer_R]
            original_R[closer_R] = some_K[at_R[closer_R]]
        fresh_R = least_R.isinf()
        near_RR = _squares(block_RD, block_RD) <= limit
        for row in fresh_R.nonzero()[:, 0].tolist():
            if fresh_R[row]:
                copies_R = near_RR[row] & fresh_R
                copies_R[: row + 1] = False
                original_R[copies_R] = begin + row
                fresh_R &= ~copies_R
        original_N[rows_R] = original_R
    return original_N


def _squares(a_QD: Tensor, b_RD: Tensor) -> Tensor:
    """|a - b|^2, float32 [Q, R]."""
    products_QR = a_QD @ b_RD.T
    return a_QD.square().sum(1, keepdim=True) - 2 * products_QR + b_RD.square().sum(1)
