"""The grid's arithmetic inside Triton kernels, bit for bit that of `grids`.

Divisions are IEEE's (Triton's own `/` is two units off). Products are never summed directly: the compiler would
fuse them and round once where PyTorch rounds twice.

Shape legend: R rows of a program, S = group size.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from dsquant.kernels import values

SMALLEST_SCALE: tl.constexpr = tl.constexpr(values.SMALLEST_SCALE)
LARGEST_SCALE: tl.constexpr = tl.constexpr(values.LARGEST_SCALE)
# Adding and subtracting it rounds a float32 below 2**22 to the nearest integer, halves to even.
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def storable_scales(scales):
    """As `grids.storable_scales`, in integers: positive, so adding to the bits rounds half to even."""
    bits = tl.minimum(tl.maximum(scales, SMALLEST_SCALE), LARGEST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def grid_of_range(low, high, shrink, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scales and zero points of groups whose least and greatest weights are given."""
    LARGEST: tl.constexpr = 2**BITS - 1
    if SYMMETRIC:
        scales = storable_scales(tl.div_rn(tl.maximum(-low, high) * shrink, LARGEST / 2))
        return scales, tl.full(scales.shape, 2 ** (BITS - 1), tl.float32)
    # Clamped after the product, which is the same, so that no product meets the subtraction.
    low = tl.minimum(low * shrink, 0.0)
    high = tl.maximum(high * shrink, 0.0)
    scales = storable_scales(tl.div_rn(high - low, LARGEST + 0.0))
    zero_points = (tl.div_rn(-low, scales) + ROUNDER) - ROUNDER
    return scales, tl.minimum(tl.maximum(zero_points, 0.0), LARGEST)


@triton.jit
def centred_codes(weight, scales, zero_points, BITS: tl.constexpr):
    """Code minus zero point of each weight, as float32; clamped before it is rounded, which is the same."""
    steps = tl.div_rn(weight, scales)
    steps = tl.minimum(tl.maximum(steps, -zero_points), (2**BITS - 1) - zero_points)
    return (steps + ROUNDER) - ROUNDER
