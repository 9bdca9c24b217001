"""Paths between codes, and grids.

Shapes: N rows, D latent size, S steps of a path.
"""

import torch
from torch import Tensor

from t5vae.common.errors import UserError

METHODS = ("linear", "slerp")


def path(a_ND: Tensor, b_ND: Tensor, steps: int, method: str = "linear") -> Tensor:
    """Evenly spaced codes from each a to its b, both ends included and exact.

    Args:
        a_ND, b_ND: float [N, D].
        steps: S, at least 2.
        method: "linear", or "slerp", which turns from a to b at an even pace around the origin
            (Shoemake, SIGGRAPH 1985); where a and b point the same way, or exactly opposite ways,
            it is the straight line.

    Returns:
        float [N, S, D].

    Raises:
        UserError: for an unknown method or fewer than two steps.
    """
    if steps < 2:
        raise UserError(f"an interpolation has at least 2 steps, its ends; {steps} given")
    if method not in METHODS:
        raise UserError(f"unknown interpolation method {method!r}; choose linear or slerp")
    a_N1D, b_N1D = a_ND[:, None], b_ND[:, None]
    share_S1 = torch.linspace(0, 1, steps, dtype=a_ND.dtype, device=a_ND.device)[:, None]
    straight_NSD = torch.lerp(a_N1D, b_N1D, share_S1)
    if method == "linear":
        return straight_NSD
    cosine_N = torch.nn.functional.cosine_similarity(a_ND, b_ND).clamp(-1, 1)
    angle_N11 = cosine_N.arccos()[:, None, None]
    sine_N11 = angle_N11.sin()
    turned_NSD = (
        ((1 - share_S1) * angle_N11).sin() * a_N1D + (share_S1 * angle_N11).sin() * b_N1D
    ) / sine_N11
    return torch.where(sine_N11 > 1e-3, turned_NSD, straight_NSD)


def grid(corners_4D: Tensor, steps: int, method: str = "linear") -> Tensor:
    """Codes of a square between four: paths from a to b and from c to d, and paths across.

    Args:
        corners_4D: float [4, D]: a, b, c, d, at the upper left and right, the lower left and right.
        steps: S, of each side.
        method: as in `path`.

    Returns:
        float [S, S, D]; rows go down, from a to c.
    """
    upper_1SD, lower_1SD = (
        path(corners_4D[i : i + 1], corners_4D[i + 1 : i + 2], steps, method) for i in (0, 2)
    )
    return path(upper_1SD[0], lower_1SD[0], steps, method).transpose(0, 1)
