"""`grids`' plain rounding on a GPU, in one pass over memory.

A contiguous weight is a list of groups one after the other, so a program takes N groups, whatever rows they are of.

Shape legend: O out features, I in features, G groups along I, S = group size, N groups of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids import RoundedRows
from dsquant.kernels.grids_triton import centred_codes, grid_of_range

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


def fake_quantize_difference(
    weight_OI: torch.Tensor, column_scales_I: torch.Tensor | None, group_size: int, bits: int, symmetric: bool
) -> torch.Tensor:
    """The error of plain rounding on the weight's GPU.

    Args:
        weight_OI: as for `grids.fake_quantize_difference`.
        column_scales_I: as for `grids.fake_quantize_difference`.
        group_size: as for `grids.fake_quantize_difference`.
        bits: as for `grids.fake_quantize_difference`.
        symmetric: as for `grids.fake_quantize_difference`.

    Returns:
        As `grids.fake_quantize_difference`.
    """
    weight_OI = weight_OI.contiguous()
    difference_OI = torch.empty_like(weight_OI)
    num_groups, per_row = weight_OI.numel() // group_size, weight_OI.shape[1] // group_size
    groups = max(1, WEIGHTS // group_size)
    scaled = column_scales_I is not None
    tensors = (weight_OI, weight_OI if column_scales_I is None else column_scales_I.contiguous(), difference_OI)
    shape = (num_groups, per_row, group_size, groups, bits, symmetric, scaled)
    _difference[triton.cdiv(num_groups, groups),](*tensors, *shape, num_warps=WARPS)
    return difference_OI


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
    SCALED: tl.constexpr,
):
    groups_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N1 = (groups_N < num_groups)[:, None]
    places_NS = groups_N[:, None] * S + tl.arange(0, S)[None, :]
    weight_NS = tl.load(weight + places_NS, mask=inside_N1, other=0.0)
    scaled_NS = weight_NS
    if SCALED:
        columns_NS = (groups_N % per_row)[:, None] * S + tl.arange(0, S)[None, :]
        column_scales_NS = tl.load(column_scales + columns_NS)
        scaled_NS = weight_NS * column_scales_NS
    scales_N, zeros_N = grid_of_range(tl.min(scaled_NS, 1), tl.max(scaled_NS, 1), 1.0, BITS, SYMMETRIC)
    rounded_NS = centred_codes(scaled_NS, scales_N[:, None], zeros_N[:, None], BITS) * scales_N[:, None]
    if SCALED:
        rounded_NS = tl.div_rn(rounded_NS, column_scales_NS)
    tl.store(difference + places_NS, rounded_NS - weight_NS, mask=inside_N1)
