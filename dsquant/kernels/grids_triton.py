"""The arithmetic of `grids` inside Triton kernels, bit for bit.

Divisions are IEEE's (Triton's own `/` is two units off). Products are never summed directly, but where they are exact:
the compiler would fuse them and round once where PyTorch rounds twice.

Shape legend: R rows of a program, S = block size.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from dsquant.kernels import values

SMALLEST_SCALE: tl.constexpr = tl.constexpr(values.SMALLEST_SCALE)
LARGEST_SCALE: tl.constexpr = tl.constexpr(values.LARGEST_SCALE)
INTEGERS: tl.constexpr = tl.constexpr(int(values.Kind.INTEGERS))
OFFSETS: tl.constexpr = tl.constexpr(int(values.Kind.OFFSETS))
TABLE: tl.constexpr = tl.constexpr(int(values.Kind.TABLE))
# Adding and subtracting it rounds a float32 below 2**22 to the nearest integer, halves to even.
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def storable_scales(scales):
    """As `grids.storable_scales`, in integers: without its sign adding to the bits rounds half to even."""
    bits = tl.minimum(tl.maximum(tl.abs(scales), SMALLEST_SCALE), LARGEST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    sizes = bits.to(tl.float32, bitcast=True)
    return tl.where(scales < 0, -sizes, sizes)


@triton.jit
def grid_of_range(low, high, ratio, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scales and zero points of groups of integers whose least and greatest weights are given."""
    if SYMMETRIC:
        scales = storable_scales(tl.div_rn(tl.maximum(-low, high) * ratio, LARGEST / 2))
        return scales, tl.full(scales.shape, (LARGEST + 1) // 2, tl.float32)
    # Clamped after the product, which is the same, so that no product meets the subtraction.
    low = tl.minimum(low * ratio, 0.0)
    high = tl.maximum(high * ratio, 0.0)
    scales = storable_scales(tl.div_rn(high - low, LARGEST + 0.0))
    zero_points = (tl.div_rn(-low, scales) + ROUNDER) - ROUNDER
    return scales, tl.minimum(tl.maximum(zero_points, 0.0), LARGEST)


@triton.jit
def nearest_level(values, table, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """The codes of the levels next to values in units of the scale, and those levels."""
    if KIND != TABLE:
        codes = (tl.minimum(tl.maximum(values, 0.0), LARGEST) + ROUNDER) - ROUNDER
        return codes, codes
    codes = tl.zeros(values.shape, tl.float32)
    levels = codes + tl.load(table)
    for place in tl.static_range(LARGEST):
        above = values > tl.load(table + LARGEST + 1 + place)
        codes += tl.where(above, 1.0, 0.0)
        levels = tl.where(above, tl.load(table + place + 1), levels)
    return codes, levels


@triton.jit
def nearest(weight, scales, zero_points, table, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """The codes next to weights, and the weights that they stand for."""
    divisors = tl.where(scales != 0, scales, float("inf"))
    if KIND == INTEGERS:  # clamped before it is rounded, which is the same
        steps = tl.div_rn(weight, divisors)
        steps = tl.minimum(tl.maximum(steps, -zero_points), LARGEST - zero_points)
        steps = (steps + ROUNDER) - ROUNDER
        return steps + zero_points, steps * scales
    if KIND == OFFSETS:
        codes, levels = nearest_level(tl.div_rn(weight + zero_points, divisors), table, LARGEST, KIND)
        return codes, levels * scales - zero_points
    codes, levels = nearest_level(tl.div_rn(weight, divisors), table, LARGEST, KIND)
    return codes, levels * scales


@triton.jit
def weights_of_codes(codes, scales, zero_points, table, KIND: tl.constexpr):
    """The weights that codes stand for."""
    if KIND == INTEGERS:
        return (codes - zero_points) * scales
    if KIND == OFFSETS:
        return codes * scales - zero_points
    return tl.load(table + codes.to(tl.int32)) * scales
