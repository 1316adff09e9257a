"""`grids`' plain rounding on a GPU, in one pass over memory.

A contiguous weight is a list of groups one after the other, so a program takes N groups, whatever rows they are of.

Shape legend: O out features, I in features, G groups along I, S = group size, N groups of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import centred_codes, grid_of_range
from dsquant.kernels.values import RoundedRows

# Weights of a program: 16 to a thread; more spill registers.
WEIGHTS = 2048
WARPS = 4


def round_rows(
    weight_OI: torch.Tensor, group_size: int, bits: int, symmetric: bool, shrink_OG: torch.Tensor | float = 1.0
) -> RoundedRows:
    """Rounds a weight on its GPU.

    Args:
        weight_OI: as for `grids.round_rows`.
        group_size: as for `grids.round_rows`.
        bits: as for `grids.round_rows`.
        symmetric: as for `grids.round_rows`.
        shrink_OG: as for `grids.round_rows`.

    Returns:
        As `grids.round_rows`.
    """
    weight_OI = weight_OI.contiguous()
    num_groups = weight_OI.numel() // group_size
    scales_OG = weight_OI.new_empty(len(weight_OI), weight_OI.shape[1] // group_size)
    rounded = RoundedRows(
        torch.empty_like(weight_OI, dtype=torch.uint8), scales_OG, torch.empty_like(scales_OG, dtype=torch.uint8)
    )
    each = isinstance(shrink_OG, torch.Tensor)
    shrink = shrink_OG.expand_as(scales_OG).contiguous() if isinstance(shrink_OG, torch.Tensor) else shrink_OG
    groups = max(1, WEIGHTS // group_size)
    tensors = (weight_OI, shrink, rounded.codes_OI, scales_OG, rounded.zero_points_OG)
    shape = (num_groups, group_size, groups, bits, symmetric, each)
    _round[triton.cdiv(num_groups, groups),](*tensors, *shape, num_warps=WARPS)
    return rounded


def dequantize_rows(rounded: RoundedRows, group_size: int, minus_OI: torch.Tensor | None = None) -> torch.Tensor:
    """Dequantizes on the codes' GPU.

    Args:
        rounded: as for `grids.dequantize_rows`.
        group_size: as for `grids.dequantize_rows`.
        minus_OI: as for `grids.dequantize_rows`.

    Returns:
        As `grids.dequantize_rows`.
    """
    codes_OI = rounded.codes_OI.contiguous()
    weight_OI = torch.empty_like(codes_OI, dtype=torch.float32)
    num_groups, groups = codes_OI.numel() // group_size, max(1, WEIGHTS // group_size)
    grid = (rounded.scales_OG.contiguous(), rounded.zero_points_OG.contiguous())
    minus = weight_OI if minus_OI is None else minus_OI.contiguous()
    shape = (num_groups, group_size, groups, minus_OI is not None)
    _dequantize[triton.cdiv(num_groups, groups),](codes_OI, *grid, minus, weight_OI, *shape, num_warps=WARPS)
    return weight_OI


def fake_quantize_difference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, bits: int, symmetric: bool
) -> torch.Tensor:
    """The error of plain rounding on the weight's GPU.

    Args:
        weight_OI: as for `grids.fake_quantize_difference`.
        column_scales_CI: as for `grids.fake_quantize_difference`.
        group_size: as for `grids.fake_quantize_difference`.
        bits: as for `grids.fake_quantize_difference`.
        symmetric: as for `grids.fake_quantize_difference`.

    Returns:
        As `grids.fake_quantize_difference`.
    """
    weight_OI = weight_OI.contiguous()
    num_scales, per_row = len(column_scales_CI), weight_OI.shape[1] // group_size
    difference_COI = weight_OI.new_empty(num_scales, *weight_OI.shape)
    num_groups, groups = weight_OI.numel() // group_size, max(1, WEIGHTS // group_size)
    tensors = (weight_OI, column_scales_CI.contiguous(), difference_COI)
    shape = (num_groups, per_row, group_size, groups, bits, symmetric)
    _difference[triton.cdiv(num_groups, groups), num_scales](*tensors, *shape, num_warps=WARPS)
    return difference_COI


@triton.jit
def _round(
    weight,
    shrink,
    codes,
    scales,
    zero_points,
    num_groups,
    S: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EACH: tl.constexpr,
):
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = groups_N < num_groups
    places_NS = groups_N[:, None] * S + tl.arange(0, S)[None, :]
    weight_NS = tl.load(weight + places_NS, mask=inside_N[:, None], other=0.0)
    shrink_N = tl.load(shrink + groups_N, mask=inside_N, other=1.0) if EACH else shrink
    scales_N, zeros_N = grid_of_range(tl.min(weight_NS, 1), tl.max(weight_NS, 1), shrink_N, BITS, SYMMETRIC)
    codes_NS = centred_codes(weight_NS, scales_N[:, None], zeros_N[:, None], BITS) + zeros_N[:, None]
    tl.store(codes + places_NS, codes_NS.to(tl.uint8), mask=inside_N[:, None])
    tl.store(scales + groups_N, scales_N, mask=inside_N)
    tl.store(zero_points + groups_N, zeros_N.to(tl.uint8), mask=inside_N)


@triton.jit
def _dequantize(
    codes, scales, zero_points, minus, weight, num_groups, S: tl.constexpr, N: tl.constexpr, SUBTRACT: tl.constexpr
):
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = groups_N < num_groups
    places_NS = groups_N[:, None] * S + tl.arange(0, S)[None, :]
    scales_N = tl.load(scales + groups_N, mask=inside_N, other=0.0)
    zeros_N = tl.load(zero_points + groups_N, mask=inside_N, other=0).to(tl.float32)
    codes_NS = tl.load(codes + places_NS, mask=inside_N[:, None], other=0).to(tl.float32)
    # The product is exact (8 bits times 8), so it does not matter that the compiler fuses it with the difference.
    weight_NS = (codes_NS - zeros_N[:, None]) * scales_N[:, None]
    if SUBTRACT:
        weight_NS -= tl.load(minus + places_NS, mask=inside_N[:, None], other=0.0)
    tl.store(weight + places_NS, weight_NS, mask=inside_N[:, None])


@triton.jit
def _difference(
    weight,
    column_scales,
    difference,
    num_groups,
    per_row,
    S: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N1 = (groups_N < num_groups)[:, None]
    columns_S = tl.arange(0, S)[None, :]
    places_NS = groups_N[:, None] * S + columns_S
    weight_NS = tl.load(weight + places_NS, mask=inside_N1, other=0.0)
    scales_of_row = tl.program_id(1) * per_row * S
    column_scales_NS = tl.load(column_scales + scales_of_row + (groups_N % per_row)[:, None] * S + columns_S)
    scaled_NS = weight_NS * column_scales_NS
    scales_N, zeros_N = grid_of_range(tl.min(scaled_NS, 1), tl.max(scaled_NS, 1), 1.0, BITS, SYMMETRIC)
    rounded_NS = centred_codes(scaled_NS, scales_N[:, None], zeros_N[:, None], BITS) * scales_N[:, None]
    rounded_NS = tl.div_rn(rounded_NS, column_scales_NS)
    difference += tl.program_id(1).to(tl.int64) * num_groups * S
    tl.store(difference + places_NS, rounded_NS - weight_NS, mask=inside_N1)
