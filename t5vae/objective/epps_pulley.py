"""The sliced Epps-Pulley statistic: do the codes look like the prior from every side?

Shapes: b codes of this rank (B), D latent size, M directions, m directions of a chunk, K knots.
N is the number of rows of the global batch that count.

Isotropic kernels in many dimensions hardly see axis structure or tails: this compares the codes'
projections on random directions and on the coordinate axes with N(0, 1), one by one, at a cost
linear in N. The data-parallel ranks add up their empirical characteristic functions, [K, M]
complex numbers, once in the forward pass; the backward pass communicates nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from t5vae.common.devices import sent
from t5vae.objective.gradient import with_gradient
from t5vae.objective.precision import true_fp32

# The trapezoid rule with step h turns cos(t d) into a function of d of period 2 pi / h (Poisson's
# summation formula). For 16 steps to t = 5 that is 20.1, so the rule errs by less than 1e-6 while
# every projection lies within 7.4 of 0. What lies beyond t = 5 is worth 6e-7.
LIMIT, STEPS = 5.0, 16


@true_fp32()
def sliced_epps_pulley(
    z_BD: Tensor,
    *,
    slices: int = 256,
    axes: bool = True,
    estimator: str = "u",
    sigma: float = 1.0,
    weights_B: Tensor | None = None,
    count: int | None = None,
    group: dist.ProcessGroup | None = None,
    gradient_scale: float | None = None,
    generator_seed: int = 0,
) -> Tensor:
    """The distance of the global batch of codes from the prior, averaged over directions.

    For a direction a: the integral of w(t) |phi_N(t) - exp(-t^2 / 2)|^2 with w the density of
    N(0, 1) and phi_N(t) the mean of exp(i t <a, z> / sigma) over the N codes. Epps and Pulley
    (Biometrika 70, 1983) for a normal distribution of known mean and variance, on slices as
    SIGReg does (Balestriero and LeCun, LeJEPA, arXiv 2511.08544). The paper multiplies by N and
    weighs with exp(-t^2 / 2): its statistic is N sqrt(2 pi) times "v" here. Its 17 knots on
    [-5, 5] confuse projections 10 apart; here there are twice as many.

    A code far out, at |<a, z>| above some 7 sigma, feels next to no pull towards the prior: the
    integral is a mean of Gaussian kernels of width sigma. MMD beside it reaches further.

    Args:
        z_BD: this rank's codes, floating, [b, D]; b may differ between ranks.
        slices: random directions, uniform on the sphere.
        axes: whether the D coordinate axes are directions too.
        estimator: "u" (|phi_N|^2 made unbiased: 0 on average for codes drawn from the prior) or
            "v" (as in the paper: never negative, about 0.42 / N for such codes).
        sigma: the prior's standard deviation.
        weights_B: [b], 1 for rows that count and 0 for rows that do not; default all ones.
        count: N, where it is known, as in training: then nothing is asked of an accelerator, and
            codes that are not finite make the value NaN on every rank.
        group: the data-parallel ranks; default all, or this process alone where none is set up.
        gradient_scale: multiplies the gradient; default the number of ranks, which cancels the
            mean reduction of DeepSpeed and DDP.
        generator_seed: seeds the random directions; must be the same on every rank. Training
            draws new ones in every step.

    Returns:
        A float32 scalar, equal on every rank, with its gradient to `z_BD`; 0 where fewer than two
        rows of the global batch count. Whatever the dtype of `z_BD`, the work on rows is in
        float32, and what is added up over ranks and directions in float64.

    Raises:
        ValueError: for codes that are not finite (without `count`) or not [b, D] with b, D > 0, an
            unknown estimator, a negative number of slices, or no direction at all.
    """
    _check(z_BD, slices, axes, estimator)
    if count is None:
        if not z_BD.isfinite().all():
            raise ValueError("codes are not finite")
        count = _count(z_BD, weights_B, group)
    if count < 2:
        return with_gradient(z_BD, z_BD.new_zeros((), dtype=torch.float32), torch.zeros_like(z_BD))
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    with torch.autocast(z_BD.device.type, enabled=False):
        scaled_BD = z_BD.detach().float() / sigma
        if weights_B is None:
            weights_B = torch.ones_like(scaled_BD[:, 0])
        weights_B1 = weights_B.detach().float()[:, None]
        chunks = _chunks(scaled_BD, slices, axes, generator_seed)

        sums = [_power_sums(_turns(scaled_BD, chunk), weights_B1) for chunk in chunks]
        sums_KM = torch.cat(sums, dim=1)
        if ranks > 1:
            dist.all_reduce(torch.view_as_real(sums_KM), group=group)
        phi_KM = sums_KM / count
        gradient_BD = torch.zeros_like(scaled_BD)

        t_K1, mass_K1 = _knots(z_BD.device)
        normal_K1 = torch.exp(-t_K1.square() / 2)
        square = count / (count - 1) if estimator == "u" else 1.0
        distance_KM = square * phi_KM.abs().square() - 2 * normal_K1 * phi_KM.real
        distance_KM += 1 - square + normal_K1.square()
        value = (mass_K1 * distance_KM).sum(0).mean().float()

        # The derivative to a projection p is the real part of sum_k slope_k exp(i t_k p).
        scale = 2 * (ranks if gradient_scale is None else gradient_scale)
        slope_KM = 1j * t_K1 * mass_K1 * (square * phi_KM - normal_K1).conj()
        slope_KM *= scale / (count * phi_KM.shape[1] * sigma)
        start = 0
        for chunk in chunks:
            turn_Bm = _turns(scaled_BD, chunk)
            slope_Km = slope_KM[:, start : start + turn_Bm.shape[1]].to(turn_Bm.dtype)
            pull_Bm = _polynomial(slope_Km, turn_Bm).real * weights_B1
            if isinstance(chunk, slice):
                gradient_BD[:, chunk] += pull_Bm
            else:
                gradient_BD += pull_Bm @ chunk
            start += turn_Bm.shape[1]
    return with_gradient(z_BD, value, gradient_BD)


def _check(z_BD: Tensor, slices: int, axes: bool, estimator: str) -> None:
    if z_BD.ndim != 2 or 0 in z_BD.shape:
        raise ValueError(f"codes have shape {tuple(z_BD.shape)}; expected [rows, dimensions]")
    if estimator not in ("u", "v"):
        raise ValueError(f"estimator is {estimator!r}; choose u or v")
    if slices < 0:
        raise ValueError(f"slices is {slices}; choose 0 or more")
    if slices == 0 and not axes:
        raise ValueError("no direction to project codes on; choose slices, axes or both")


def _count(z_BD: Tensor, weights_B: Tensor | None, group: dist.ProcessGroup | None) -> int:
    """Rows of the global batch that count; all ranks ask together."""
    counts_B = z_BD.new_ones(len(z_BD)) if weights_B is None else weights_B
    count = counts_B.sum(dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(count, group=group)
    return int(count)


def _directions(slices: int, dimensions: int, seed: int) -> Tensor:
    """Random unit vectors, [slices, D], drawn on the CPU: the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(slices, dimensions, generator=generator))


def _chunks(z_BD: Tensor, slices: int, axes: bool, seed: int) -> list[Tensor | slice]:
    """All directions in chunks: vectors [m, D], then the axes as ranges of coordinates."""
    rows, dimensions = z_BD.shape
    # A CPU's cache wants small chunks, a GPU few launches.
    size = max(1, (2**18 if z_BD.device.type == "cpu" else 2**22) // rows)
    chunks: list[Tensor | slice] = []
    if slices:
        chunks += sent(_directions(slices, dimensions, seed), z_BD.device).split(size)
    if axes:
        chunks += [slice(i, min(i + size, dimensions)) for i in range(0, dimensions, size)]
    return chunks


def _knots(device: torch.device) -> tuple[Tensor, Tensor]:
    """Knots t > 0 and their masses, [K, 1] float64: the trapezoid rule of an even function under
    the density of N(0, 1). At t = 0 both characteristic functions are 1."""
    t = torch.linspace(0, LIMIT, STEPS + 1, dtype=torch.float64, device=device)[:, None]
    mass = torch.exp(-t.square() / 2)
    mass[0] /= 2
    mass[-1] /= 2
    return t[1:], (mass / mass.sum())[1:]


def _turns(z_BD: Tensor, chunk: Tensor | slice) -> Tensor:
    """exp(i h p) for the step h of the knots and the projections p on a chunk, [B, m] complex."""
    p_Bm = z_BD[:, chunk] if isinstance(chunk, slice) else z_BD @ chunk.T
    angle_Bm = p_Bm * (LIMIT / STEPS)
    return torch.complex(angle_Bm.cos(), angle_Bm.sin())


def _power_sums(turn_Bm: Tensor, weights_B1: Tensor) -> Tensor:
    """The weighted sums over rows of the powers 1 to K of `turn_Bm`, [K, m] complex128."""
    power_Bm = turn_Bm * weights_B1
    sums = [power_Bm.sum(0)]
    for _ in range(STEPS - 1):
        power_Bm *= turn_Bm
        sums.append(power_Bm.sum(0))
    return torch.stack(sums).to(torch.complex128)


def _polynomial(coefficients_Km: Tensor, turn_Bm: Tensor) -> Tensor:
    """sum_k coefficients_km turn_Bm^k for k = 1 to K, by Horner's rule, [B, m]."""
    total_Bm = coefficients_Km[-1] * turn_Bm
    for coefficient_m in coefficients_Km[:-1].flip(0):
        total_Bm += coefficient_m
        total_Bm *= turn_Bm
    return total_Bm
