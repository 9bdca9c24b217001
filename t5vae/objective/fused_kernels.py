"""What runs on the device for `fused`, whose letters are used.

Shapes: a program takes ROWS rows of x and, of pairs, COLUMNS columns of y at a time; WIDTH is W.
"""

import math

import triton
import triton.language as tl

FAR = tl.constexpr(1e30)  # the squared norm of padding: phi and P vanish there
# Distances are taken shorter by this share of |x|^2 + |y|^2, which is about the rounding of their
# product, so that equal codes, however large, are at distance 0.
ROUNDING = tl.constexpr(2.0**-21)
EXPM1 = tl.constexpr(tuple(1 / math.factorial(i) for i in range(7, 0, -1)))  # its series over u


@triton.jit
def prepare(
    x_ptr, out_ptr, norm_ptr, rows, dimensions, width, scale, factor,
    HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    real = row < rows
    x = tl.load(x_ptr + row[:, None] * dimensions + d, real[:, None] & (d < dimensions), 0.0)
    x *= scale
    if HALF:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    tl.store(out_ptr + row[:, None] * width + d, x, d < width)
    x = x.to(tl.float32)
    norm = tl.sum(x * x, 1) * ((1 - ROUNDING) * factor)
    tl.store(norm_ptr + row, tl.where(real, norm, FAR))


@triton.jit
def finish(
    x_ptr, rounded_ptr, norm_ptr, pull_ptr, weight_ptr, out_ptr, rows, dimensions, padded, width,
    parts, unscale, slope, near, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    pull = tl.zeros((ROWS, WIDTH), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        pull += tl.load(pull_ptr + (part * padded + row)[:, None] * width + d, d < width, 0.0)
        weight += tl.load(weight_ptr + part * padded + row)
    real = (row < rows)[:, None] & (d < dimensions)
    x = tl.load(x_ptr + row[:, None] * dimensions + d, real, 0.0)
    # The roundings of all y near x average out, so that x itself is best not rounded; but alone
    # with its own y it has to be rounded as that is, or their difference would not be 0.
    rounded = tl.load(rounded_ptr + row[:, None] * width + d, d < width, 0.0).to(tl.float32)
    x = tl.where((tl.load(norm_ptr + row) > near)[:, None], rounded * unscale, x)
    pull = slope * (pull * unscale - weight[:, None] * x)
    tl.store(out_ptr + row[:, None] * dimensions + d, pull, real)


@triton.jit
def pair(
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, pull_ptr, weight_ptr, phi_ptr,
    rows, columns, padded, span, twice,
    WIDTH: tl.constexpr, EXACT: tl.constexpr, octaves: tl.constexpr, fractions: tl.constexpr,
    terms: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)[None, :]
    first = tl.program_id(1) * span
    x = tl.load(x_ptr + row[:, None] * WIDTH + d)
    x_norm = tl.load(x_norm_ptr + row)
    pull = tl.zeros((ROWS, WIDTH), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    phi = tl.zeros((ROWS,), tl.float32)
    column = first.to(tl.int64) + tl.arange(0, COLUMNS)
    y_ptrs = y_ptr + column[:, None] * WIDTH + d
    y_norm_ptrs = y_norm_ptr + column
    for start in range(first, min(first + span, padded), COLUMNS):
        y = tl.load(y_ptrs)
        xy = tl.dot(x, y.T, input_precision="ieee")
        s = x_norm[:, None] + tl.load(y_norm_ptrs)[None, :] - twice * xy
        more, slope = _phi(s, start, columns, EXACT, octaves, fractions, terms, COLUMNS)
        phi += more
        weight += tl.sum(slope, 1)
        pull = tl.dot(slope.to(y.dtype), y, pull, input_precision="ieee")
        y_ptrs += COLUMNS * WIDTH
        y_norm_ptrs += COLUMNS
    row += tl.program_id(1) * rows
    tl.store(pull_ptr + row[:, None] * WIDTH + d, pull)
    tl.store(weight_ptr + row, weight)
    tl.store(phi_ptr + row, phi / terms)


@triton.jit
def slope(
    x_ptr, y_ptr, x_norm_ptr, y_norm_ptr, slope_ptr, weight_ptr, phi_ptr,
    rows, columns, padded, twice,
    WIDTH: tl.constexpr, EXACT: tl.constexpr, octaves: tl.constexpr, fractions: tl.constexpr,
    terms: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SLICE: tl.constexpr = 32 if EXACT else 64
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start.to(tl.int64) + tl.arange(0, COLUMNS)
    d = tl.arange(0, SLICE)[None, :]
    x_ptrs = x_ptr + row[:, None] * WIDTH + d
    y_ptrs = y_ptr + column[:, None] * WIDTH + d
    xy = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, WIDTH, SLICE):
        xy = tl.dot(tl.load(x_ptrs), tl.load(y_ptrs).T, xy, input_precision="ieee")
        x_ptrs += SLICE
        y_ptrs += SLICE
    s = tl.load(x_norm_ptr + row)[:, None] + tl.load(y_norm_ptr + column)[None, :] - twice * xy
    phi, slope = _phi(s, start, columns, EXACT, octaves, fractions, terms, COLUMNS)
    tl.store(slope_ptr + row[:, None] * padded + column[None, :], slope.to(x_ptr.dtype.element_ty))
    row += tl.program_id(1) * rows
    tl.store(weight_ptr + row, tl.sum(slope, 1))
    tl.store(phi_ptr + row, phi / terms)


@triton.jit
def _phi(
    s, start, columns, EXACT: tl.constexpr, octaves: tl.constexpr, fractions: tl.constexpr,
    terms: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over a tile's columns of phi - 1, unless they are padding, and P for each pair.

    With factors of fp32, Gaussians are added up as phi - 1, so that flat ones keep their digits;
    otherwise phi is, and the ones are subtracted at the end, which halves the arithmetic.
    """
    within = tl.maximum(tl.minimum(columns - start, COLUMNS), 0)
    s = tl.maximum(s, 0.0)
    if octaves == 0:
        s = tl.minimum(s, 1e9)  # beyond it the polynomials overflow
        phi = tl.zeros_like(s)
        slope = tl.zeros_like(s)
        for g in tl.static_range(0, terms, 4):
            part, falling = _fraction_at(s, fractions, 4 * g, terms - g if terms - g < 4 else 4)
            phi += part
            slope += falling
    else:
        power = tl.exp2(-s)
        excess = exp2m1(-s, power) if EXACT else power
        phi = excess
        slope = power
        for m in tl.static_range(1, octaves):
            power *= power
            excess = excess * (excess + 2) if EXACT else power
            phi += excess
            slope += 2**m * power
    if EXACT or octaves == 0:
        phi = tl.where((tl.arange(0, COLUMNS) < within)[None, :], phi, 0.0)
    ones = 0 if EXACT and octaves > 0 else terms
    return tl.sum(phi, 1) - ones * within, slope


@triton.jit
def _fraction_at(s, fractions: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """The fraction of n terms, and minus its derivative."""
    inverse = 1 / _polynomial(s, fractions, FIRST + N, N + 1)
    phi = _polynomial(s, fractions, FIRST, N) * inverse
    rising = _polynomial(s, fractions, FIRST + 2 * N + 1, N - 1)
    return phi, (phi * _polynomial(s, fractions, FIRST + 3 * N, N) - rising) * inverse


@triton.jit
def _polynomial(s, coefficients: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    value = coefficients[FIRST] if COUNT > 0 else 0.0
    for i in tl.static_range(1, COUNT):
        value = value * s + coefficients[FIRST + i]
    return value


@triton.jit
def exp2m1(v, power):
    """2^v - 1 for v <= 0 with all its digits; `power` is 2^v. Triton has no expm1."""
    u = v * 0.6931471805599453
    return tl.where(v > -0.5, _polynomial(u, EXPM1, 0, 7) * u, power - 1)
