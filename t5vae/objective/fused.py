"""Sums over pairs of codes in Triton, for CUDA: the arithmetic of `blocked`, fused.

Shapes: b rows x, N columns y, D latent size; R, C, W: b, N, D in whole tiles; S parts of the N.

Up to `FUSED` coordinates one kernel does everything: distances by a product on the tensor cores,
phi and P in registers, P y by a second product. A program takes a tile of rows and a part of the
columns; the parts are added afterwards in a fixed order, so that results repeat. Above that one
kernel stores P, a chunk of rows at a time, and cuBLAS does the second product.

Tiles of other sizes sum in another order. Which are fastest is found by trying them, once in a
process for each `Problem`, unless `Tiling.use` says it, as training does with what its run began
with.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from t5vae.objective import blocked, fused_kernels
from t5vae.objective.kernels import Gaussians, Kernel

Precision = Literal["fp16", "fp32"]
Tile = tuple[int, ...]  # rows, columns, warps, stages

FUSED = {"fp16": 256, "fp32": 128}  # a wider tile does not fit the registers
TILE = 128  # rows and columns are padded to multiples of it, and tiles divide it
CHUNK = 2**26  # elements of P held at a time


class Form(NamedTuple):
    """What of a kernel is compiled in, for distances s in the kernel's own unit.

    Gaussians: sum over m < octaves of 2^(-2^m s). Inverse multiquadrics (octaves = 0): sum over
    C of C / (C + s), where each four C are a fraction N / D of polynomials, so that they cost one
    division; `fractions` has the coefficients of N, D, N' and D' of each, highest powers first, the
    latter two over P(0): P(0) = 1 is exact in fp16.
    """

    octaves: int
    fractions: tuple[float, ...]
    terms: int


class Problem(NamedTuple):
    """What tiles are chosen for: W, whether one kernel does everything, and what it computes."""

    width: int
    fused: bool
    exact: bool
    octaves: int

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """What is tried, none of which spills registers on an H100."""
        return tiles_of(self.width, self.fused, self.exact)


_chosen: dict[Problem, Tile] = {}


@dataclass(frozen=True)
class Tiling:
    """The tiles of a kernel of codes [_, D], in the precision that is its default."""

    kernel: Kernel
    dimensions: int

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Those that may be used: (rows, columns, warps, stages)."""
        return self._problem.tiles

    def milliseconds(self, rows: int, columns: int, device: torch.device) -> list[float]:
        """What `pair_sum` of so many rows and columns takes; infinite for a tile too large."""
        y_ND = torch.ones(columns, self.dimensions, device=device)
        x_BD = y_ND if rows == columns else torch.ones(rows, self.dimensions, device=device)
        return [_milliseconds(x_BD, y_ND, self.kernel, None, tile) for tile in self.tiles]

    def use(self, tile: Tile) -> None:
        """Compute with this one from now on, in this process."""
        _chosen[self._problem] = tile

    @property
    def _problem(self) -> Problem:
        return _problem(self.kernel, self.dimensions, None)


def _problem(kernel: Kernel, dimensions: int, precision: Precision | None) -> Problem:
    precision = precision or default_precision(kernel, dimensions)
    width, fused = padded_width(dimensions, precision)
    return Problem(width, fused, precision == "fp32", form_of(kernel)[0].octaves)


def _fastest(x_BD: Tensor, y_ND: Tensor, kernel: Kernel, precision: Precision) -> Tile:
    """The tile that was chosen, or else the fastest one here; the first under the interpreter."""
    problem = _problem(kernel, x_BD.shape[1], precision)
    if problem not in _chosen and triton.knobs.runtime.interpret:
        _chosen[problem] = problem.tiles[0]
    elif problem not in _chosen:
        times = [_milliseconds(x_BD, y_ND, kernel, precision, tile) for tile in problem.tiles]
        _chosen[problem] = problem.tiles[times.index(min(times))]
    return _chosen[problem]


def _milliseconds(
    x_BD: Tensor, y_ND: Tensor, kernel: Kernel, precision: Precision | None, tile: Tile
) -> float:
    def run() -> None:
        pair_sum(x_BD, y_ND, kernel, precision, tile)

    try:
        return triton.testing.do_bench(run, return_mode="median")
    except (OutOfResources, PTXASError):
        return math.inf


def centred_pair_sum(
    x_BD: Tensor, y_ND: Tensor, kernel: Kernel, centre_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`pair_sum` of codes from which a centre is taken first, as `blocked.pair_sum` does it."""
    if centre_D is None:
        return pair_sum(x_BD, y_ND, kernel)
    y_centred_ND = y_ND - centre_D
    x_centred_BD = y_centred_ND if y_ND is x_BD else x_BD - centre_D
    return pair_sum(x_centred_BD, y_centred_ND, kernel)


def pair_sum(
    x_BD: Tensor,
    y_ND: Tensor,
    kernel: Kernel,
    precision: Precision | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum phi over all pairs, and what pulls each x.

    Args:
        x_BD: float32 [b, D], centred for accuracy: a common shift changes nothing.
        y_ND: like x, [N, D].
        kernel: phi; P = -phi'.
        precision: of the factors of both products; sums are fp32. "fp16" keeps 11 significant
            bits, as many as tf32, at twice its rate; codes beyond some 2e4 times the kernel's
            width are cut off. "fp32" is slow.
            Default: what `default_precision` says.
        tile: one of its `Problem`'s. Default: the one in use, or the fastest.

    Returns:
        float64 scalar: sum_ij (phi(s_ij) - 1); like x: sum_j P(s_ij) (y_j - x_i).
    """
    rows, dimensions = x_BD.shape
    precision = precision or default_precision(kernel, dimensions)
    tile = tile or _fastest(x_BD, y_ND, kernel, precision)
    form, unit, slope, near = form_of(kernel)
    width, fused = padded_width(dimensions, precision)
    # Coordinates near 1, whatever D, for codes as large as the kernel is wide.
    scale = 2.0 ** round(math.log2(unit * dimensions) / 2)
    factor = unit / scale**2
    sizes = (width, scale, factor, precision)
    x_RW, x_norm_R = _prepare(x_BD, *sizes)
    y_CW, y_norm_C = (x_RW, x_norm_R) if y_ND is x_BD else _prepare(y_ND, *sizes)
    run = _in_one if fused else _in_two
    pull_SRW, weight_SR, phi_SR = run(
        x_RW, y_CW, x_norm_R, y_norm_C, len(y_ND), 2 * factor, form, tile
    )
    total = phi_SR[:, :rows].sum(dtype=torch.float64)

    pull_BD = torch.empty_like(x_BD)
    thin = _thin_tile(width)
    fused_kernels.finish[(triton.cdiv(rows, thin["ROWS"]),)](
        x_BD, x_RW, x_norm_R, pull_SRW, weight_SR, pull_BD, rows, dimensions, len(x_RW), width,
        len(pull_SRW), 1 / scale, slope, near, **thin,
    )  # fmt: skip
    return total, pull_BD


def default_precision(kernel: Kernel, dimensions: int) -> Precision:
    """ "fp32" for a kernel so flat that fp16, or tf32, would lose what it sees, "fp16" otherwise.

    Where gamma s is small, P is gamma (1 - gamma s): its constant part only sees the mean, and
    cancels against the prior's, so that the variance shows in a share gamma s of the gradient, with
    s near 2 D. Factors rounded to 11 bits err by up to 2^-11 of the whole, that is
    2^-11 / (2 D gamma) of this share, here held to 1 %. The narrowest part of a kernel decides.
    """
    return "fp32" if 2 * dimensions / blocked.reach(kernel) < 100 * 2**-11 else "fp16"


@cache
def form_of(kernel: Kernel) -> tuple[Form, float, float, float]:
    """A kernel's form; its unit, s in the form = unit |x - y|^2; P = slope * the form's P; and the
    unit |x|^2 of codes so far out that there are hardly any others in the kernel's reach."""
    if isinstance(kernel, Gaussians):
        form = Form(kernel.octaves, (), kernel.octaves)
        return form, kernel.gamma / math.log(2), kernel.gamma / kernel.octaves, 4.0
    unit = 1 / min(kernel.scales)
    scales = sorted(round(c * unit, 6) for c in kernel.scales)
    top = sum(1 / c for c in scales)
    fours = (_fraction(scales[i : i + 4], top) for i in range(0, len(scales), 4))
    form = Form(0, tuple(chain.from_iterable(fours)), len(scales))
    return form, unit, unit * top / len(scales), 4 * max(scales)


def _fraction(scales: list[float], top: float) -> list[float]:
    """N, D, N' / top and D' / top, with n, n + 1, n - 1 and n coefficients for n scales."""
    below = np.poly([-c for c in scales])
    others = (np.atleast_1d(np.poly([-d for d in scales if d != c])) for c in scales)
    above = np.sum([c * other for c, other in zip(scales, others, strict=True)], axis=0)
    slopes = np.concatenate([np.polyder(above), np.polyder(below)]) / top
    return np.concatenate([above, below, slopes]).tolist()


def padded_width(dimensions: int, precision: Precision) -> tuple[int, bool]:
    """W, and whether one kernel does everything."""
    if dimensions <= FUSED[precision]:
        return max(16, triton.next_power_of_2(dimensions)), True
    return triton.cdiv(dimensions, 64) * 64, False


def _prepare(x_BD: Tensor, width: int, scale: float, factor: float, precision: Precision):
    """The codes times `scale`, rounded and padded, [R, W], and `factor` times their squared norms.

    The norms are those of the rounded codes. Distances are then exactly those of rounded codes,
    never negative and 0 between equal ones, whatever the rounding.
    """
    rows, dimensions = x_BD.shape
    padded = triton.cdiv(rows, TILE) * TILE
    dtype = torch.float16 if precision == "fp16" else torch.float32
    x_RW = x_BD.new_empty(padded, width, dtype=dtype)
    norm_R = x_BD.new_empty(padded)
    tile = _thin_tile(width)
    fused_kernels.prepare[(padded // tile["ROWS"],)](
        x_BD, x_RW, norm_R, rows, dimensions, width, scale, factor, precision == "fp16", **tile
    )
    return x_RW, norm_R


def _thin_tile(width: int) -> dict[str, int]:
    whole = triton.next_power_of_2(width)
    return {"ROWS": min(TILE, max(1, 4096 // whole)), "WIDTH": whole}


def _in_one(x_RW, y_CW, x_norm_R, y_norm_C, columns: int, twice: float, form: Form, tile: Tile):
    """Sums of P y, [S, R, W], and of P and phi - 1, [S, R], over S parts of the columns."""
    rows, width = x_RW.shape
    parts = _parts(rows // TILE, len(y_CW) // TILE, x_RW.device)
    span = triton.cdiv(len(y_CW) // TILE, parts) * TILE
    pull_SRW = x_norm_R.new_empty(parts, rows, width)
    weight_SR, phi_SR = x_norm_R.new_empty(2, parts, rows)
    exact = x_RW.dtype == torch.float32
    fused_kernels.pair[(rows // tile[0], parts)](
        x_RW, y_CW, x_norm_R, y_norm_C, pull_SRW, weight_SR, phi_SR, rows, columns, len(y_CW),
        span, twice, WIDTH=width, EXACT=exact, **form._asdict(), **_launched(tile),
    )  # fmt: skip
    return pull_SRW, weight_SR, phi_SR


@cache
def _parts(row_tiles: int, column_tiles: int, device: torch.device) -> int:
    """Into how many parts to split the columns, so that no processor idles for long."""
    processors = 4
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count

    def duration(parts: int) -> int:  # of one tile, or of starting and storing, is 1
        return triton.cdiv(row_tiles * parts, processors) * (triton.cdiv(column_tiles, parts) + 1)

    return min(range(1, min(column_tiles, processors) + 1), key=duration)


def _in_two(x_RW, y_CW, x_norm_R, y_norm_C, columns: int, twice: float, form: Form, tile: Tile):
    """As `_in_one`, with S = 1 for P y and P; S tiles of columns for phi - 1."""
    (rows, width), padded = x_RW.shape, len(y_CW)
    exact = x_RW.dtype == torch.float32
    chunk = max(TILE, CHUNK // padded // TILE * TILE)
    slope_rC = torch.empty(min(chunk, rows), padded, dtype=x_RW.dtype, device=x_RW.device)
    pull_RW = x_norm_R.new_empty(rows, width)
    weight_SR, phi_SR = x_norm_R.new_empty(2, padded // tile[1], rows)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        x_rW, slope_rC = x_RW[part], slope_rC[: part.stop - start]
        fused_kernels.slope[(len(x_rW) // tile[0], padded // tile[1])](
            x_rW, y_CW, x_norm_R[part], y_norm_C, slope_rC, weight_SR[:, part], phi_SR[:, part],
            rows, columns, padded, twice, WIDTH=width, EXACT=exact, **form._asdict(),
            **_launched(tile),
        )  # fmt: skip
        pull_RW[part] = _product(slope_rC, y_CW)
    return pull_RW[None], weight_SR.sum(0, keepdim=True), phi_SR


def _product(slope_rC: Tensor, y_CW: Tensor) -> Tensor:
    """float32 [r, W]: by cuBLAS with sums in fp32, or in fp64 whatever torch does with fp32."""
    if slope_rC.dtype == torch.float16 and slope_rC.is_cuda:
        return torch.mm(slope_rC, y_CW, out_dtype=torch.float32)
    return (slope_rC.double() @ y_CW.double()).float()


def tiles_of(width: int, fused: bool, exact: bool) -> tuple[Tile, ...]:
    """What is tried for a problem."""
    if fused and exact:
        return (32, 32, 4, 2), (64, 32, 8, 2)
    if fused:
        tiles = (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3)
        return tiles if width == 256 else (*tiles, (128, 128, 8, 2))
    if exact:
        return (64, 64, 4, 2), (64, 64, 8, 2)
    return (128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)


def _launched(tile: Tile) -> dict[str, int]:
    return dict(zip(("ROWS", "COLUMNS", "num_warps", "num_stages"), tile, strict=True))
