"""`super_blocks` on a GPU: a warp takes eight rows through all columns, four candidates of each row side by side.

A thread holds one candidate of a row, so sums over a block's columns stay in it, in the searches as in the rounding.
What earlier blocks' errors change in a block is one matrix product.

Shape legend: S columns, W columns of a block, B blocks, R rows of a program, C candidates, P = C * R threads, K columns
of earlier blocks.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import OFFSETS, ROUNDER, TABLE, nearest
from dsquant.kernels.scale_search import LARGEST_HALF, BlockShape
from dsquant.kernels.scale_search_triton import LEAST, candidates_on
from dsquant.kernels.side_by_side_search_triton import C, affine, factors_of, first_of_best, symmetric
from dsquant.kernels.values import CompensatedBlocks, Parameters, table_on

ROWS = 8
HALF: tl.constexpr = tl.constexpr(LARGEST_HALF)
K: tl.constexpr = tl.constexpr(16)


def compensate_blocks(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, shape: BlockShape,
    ratios: Sequence[float],
) -> CompensatedBlocks:  # fmt: skip
    """`super_blocks.compensate_blocks` on the weight's GPU, up to the order of sums."""
    (size, num_rows), device, levels = weight_SO.shape, weight_SO.device, shape.levels
    blocks = size // shape.size
    codes_SO, errors_SO = torch.empty_like(weight_SO, dtype=torch.uint8), torch.empty_like(weight_SO)
    tried = [part.new_empty(C.value, shape.size, num_rows) for part in (codes_SO, errors_SO)]
    scales_OB, zero_points_OB = weight_SO.new_empty(2, num_rows, blocks)
    factors_FO = weight_SO.new_empty(2 if levels.kind == OFFSETS.value else 1, num_rows)
    searched = candidates_on(device, levels)
    second, third = (ratios[min(place, len(ratios) - 1)] for place in (1, 2))
    _compensate[triton.cdiv(num_rows, ROWS),](
        weight_SO.contiguous(), factor_SS.T.contiguous(), importance_S.contiguous(), table_on(device, levels), searched,
        codes_SO, errors_SO, *tried, scales_OB, zero_points_OB, factors_FO, num_rows, len(searched), second, third,
        size, shape.size, ROWS, int(levels.kind), levels.largest, levels.middle, *(shape.scale_codes or (0, 0)),
        shape.scale_codes is not None, num_warps=1, num_stages=1,
    )  # fmt: skip
    supers = [factor_O.unsqueeze(1).expand(-1, blocks) for factor_O in factors_FO] if shape.scale_codes else ()
    return CompensatedBlocks(codes_SO, errors_SO, Parameters(scales_OB, zero_points_OB, tuple(supers)))


@triton.jit
def _stored(values_P, factor_P, LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """The nearest whole multiples of factors that can be stored."""
    codes_P = tl.div_rn(values_P, tl.where(factor_P != 0, factor_P, float("inf")))
    codes_P = tl.minimum(tl.maximum(codes_P, LEAST_CODE + 0.0), LARGEST_CODE + 0.0)
    return ((codes_P + ROUNDER) - ROUNDER) * factor_P


@triton.jit
def _half(values_P):
    return tl.minimum(tl.maximum(values_P, -HALF), HALF).to(tl.float16).to(tl.float32)


@triton.jit
def _searched(
    block_WP, importance, lane_P, searched, table, num_searched,
    W: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr, MIDDLE: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """A block's scale, and its mean code and mean where there are offsets."""
    importance_W = tl.load(importance + tl.arange(0, W))
    importance_W = importance_W / tl.maximum(tl.sum(importance_W, 0), LEAST)
    weights_WP = tl.broadcast_to(importance_W[:, None], [W, C * R])
    if KIND == OFFSETS:
        return affine(block_WP, weights_WP, lane_P, R, LARGEST, SIGNED)
    scale_P = symmetric(block_WP, weights_WP, lane_P, searched, num_searched, table, R, MIDDLE, LARGEST, KIND)
    return scale_P, scale_P, scale_P


@triton.jit
def _change_block(tensors, first, num_rows, S: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Writes a block's columns, changed by the errors of all before it, to where its own errors will be."""
    weight, factor, errors = tensors
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_1R = (rows_R < num_rows)[None, :]
    columns_W = first + tl.arange(0, W)
    change_WR = tl.zeros([W, R], tl.float32)
    for before in range(0, first, K):
        columns_K = before + tl.arange(0, K)
        factor_WK = tl.load(factor + columns_W[:, None] * S + columns_K[None, :])
        errors_KR = tl.load(errors + columns_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        change_WR = tl.dot(factor_WK, errors_KR, change_WR, input_precision="tf32x3")
    offsets_WR = columns_W[:, None] * num_rows + rows_R[None, :]
    weight_WR = tl.load(weight + offsets_WR, mask=inside_1R, other=0.0)
    tl.store(errors + offsets_WR, weight_WR - change_WR, mask=inside_1R)


@triton.jit
def _round_block(
    tensors, first, rows_P, scale_P, zero_P, lane_P, num_rows,
    S: tl.constexpr, W: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Rounds a block of at most 32 columns with each thread's candidate and copies each row's best: its mask."""
    factor, table, codes, errors, tried_codes, tried_errors = tensors
    inside_P = rows_P < num_rows
    tried_P = lane_P * W * num_rows + rows_P
    places_K = tl.arange(0, K)
    errors_KP = tl.zeros([K, C * R], tl.float32)
    loss_P = tl.zeros([C * R], tl.float32)
    for start in range(0, W, K):
        before_KP = errors_KP
        errors_KP = tl.zeros([K, C * R], tl.float32)
        for place in tl.static_range(K):
            column = first + start + place
            row = factor + column * S + first + start + places_K
            value_P = tl.load(errors + column * num_rows + rows_P, mask=inside_P, other=0.0)
            if W > K:
                value_P -= tl.sum(tl.load(row - K, mask=start > 0, other=0.0)[:, None] * before_KP, 0)
            value_P -= tl.sum(tl.load(row)[:, None] * errors_KP, 0)
            code_P, rounded_P = nearest(value_P, scale_P, zero_P, table, LARGEST, KIND)
            error_P = tl.div_rn(value_P - rounded_P, tl.load(factor + column * S + column))
            errors_KP = tl.where((places_K == place)[:, None], error_P[None, :], errors_KP)
            loss_P += error_P * error_P
            tl.store(tried_codes + (start + place) * num_rows + tried_P, code_P.to(tl.uint8), mask=inside_P)
            tl.store(tried_errors + (start + place) * num_rows + tried_P, error_P, mask=inside_P)
    best_P = (first_of_best(-loss_P, lane_P, R, 1.0) > 0) & inside_P
    tl.debug_barrier()
    for place in range(W):
        places_P = place * num_rows + tried_P
        column_P = (first + place) * num_rows + rows_P
        tl.store(codes + column_P, tl.load(tried_codes + places_P, mask=best_P), mask=best_P)
        tl.store(errors + column_P, tl.load(tried_errors + places_P, mask=best_P), mask=best_P)
    return best_P


@triton.jit
def _super_block(
    tensors, outputs, rows_P, lane_P, num_rows, num_searched,
    B: tl.constexpr, W: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr, MIDDLE: tl.constexpr,
    LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr,
):  # fmt: skip
    """Stores all blocks' scales and zero points as they are before a column is rounded; returns their factors."""
    weight, importance, table, searched = tensors
    scales, zero_points, factors = outputs
    columns_W = tl.arange(0, W)
    blocks_B = tl.arange(0, B)
    first_P = (rows_P < num_rows) & (lane_P == 0)
    scale_BP = tl.zeros([B, C * R], tl.float32)
    code_BP = scale_BP
    mean_BP = scale_BP
    for block in range(B):
        offsets_WP = (block * W + columns_W)[:, None] * num_rows + rows_P[None, :]
        block_WP = tl.load(weight + offsets_WP, mask=(rows_P < num_rows)[None, :], other=0.0)
        scale_P, code_P, mean_P = _searched(
            block_WP, importance + block * W, lane_P, searched, table, num_searched, W, R, KIND, LARGEST, MIDDLE, False
        )
        here_B1 = (blocks_B == block)[:, None]
        scale_BP = tl.where(here_B1, scale_P[None, :], scale_BP)
        code_BP = tl.where(here_B1, code_P[None, :], code_BP)
        mean_BP = tl.where(here_B1, mean_P[None, :], mean_BP)
    shares_B = tl.sum(tl.load(importance + blocks_B[:, None] * W + columns_W[None, :]), 1)
    shares_B = shares_B / tl.maximum(tl.sum(shares_B, 0), LEAST)
    shares_BP = tl.broadcast_to(shares_B[:, None], [B, C * R])
    factor_P, multiples_BP = factors_of(scale_BP, shares_BP, lane_P, R, LEAST_CODE, LARGEST_CODE)
    offset_factor_P = factor_P
    scale_BP = factor_P[None, :] * multiples_BP
    zero_BP = tl.full([B, C * R], 0.0 if KIND == TABLE else MIDDLE + 0.0, tl.float32)
    tl.store(factors + rows_P, factor_P, mask=first_P)
    if KIND == OFFSETS:
        offset_BP = tl.maximum(scale_BP * code_BP - mean_BP, 0.0)
        offset_factor_P, multiples_BP = factors_of(offset_BP, shares_BP, lane_P, R, LEAST_CODE, LARGEST_CODE)
        zero_BP = offset_factor_P[None, :] * multiples_BP
        tl.store(factors + num_rows + rows_P, offset_factor_P, mask=first_P)
    places_BP = rows_P[None, :] * B + blocks_B[:, None]
    tl.store(scales + places_BP, scale_BP, mask=first_P[None, :])
    tl.store(zero_points + places_BP, zero_BP, mask=first_P[None, :])
    return factor_P, offset_factor_P


# num_rows unspecialized, as in `compensation_triton`.
@triton.jit(do_not_specialize=["num_rows"])
def _compensate(
    weight, factor, importance, table, searched, codes, errors, tried_codes, tried_errors, scales, zero_points, factors,
    num_rows, num_searched, second_ratio, third_ratio,
    S: tl.constexpr, W: tl.constexpr, R: tl.constexpr, KIND: tl.constexpr, LARGEST: tl.constexpr, MIDDLE: tl.constexpr,
    LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr, SUPER: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = S // W
    places_P = tl.arange(0, C * R)
    rows_P = tl.program_id(0) * R + places_P % R
    lane_P = places_P // R
    inside_P = rows_P < num_rows
    ratio_P = tl.where(lane_P == 0, 1.0, tl.where(lane_P == 1, second_ratio, third_ratio))
    if SUPER:
        factor_P, offset_factor_P = _super_block(
            (weight, importance, table, searched), (scales, zero_points, factors), rows_P, lane_P, num_rows,
            num_searched, B, W, R, KIND, LARGEST, MIDDLE, LEAST_CODE, LARGEST_CODE,
        )  # fmt: skip
    for block in range(B):
        first = block * W
        tl.debug_barrier()  # what one thread wrote, another reads
        _change_block((weight, factor, errors), first, num_rows, S, W, R)
        tl.debug_barrier()
        offsets_WP = (first + tl.arange(0, W))[:, None] * num_rows + rows_P[None, :]
        block_WP = tl.load(errors + offsets_WP, mask=inside_P[None, :], other=0.0)
        scale_P, code_P, mean_P = _searched(
            block_WP, importance + first, lane_P, searched, table, num_searched, W, R, KIND, LARGEST, MIDDLE, not SUPER
        )
        zero_P = tl.full([C * R], 0.0 if KIND == TABLE else MIDDLE + 0.0, tl.float32)
        place_P = rows_P * B + block
        if SUPER:
            scale_P = _stored(scale_P * ratio_P, factor_P, LEAST_CODE, LARGEST_CODE)
            if KIND == OFFSETS:
                offset_P = tl.maximum(scale_P * code_P - mean_P, 0.0)
                zero_P = _stored(offset_P, offset_factor_P, LEAST_CODE, LARGEST_CODE)
            old_P = inside_P & (lane_P == C - 1)
            scale_P = tl.where(old_P, tl.load(scales + place_P, mask=inside_P, other=1.0), scale_P)
            zero_P = tl.where(old_P, tl.load(zero_points + place_P, mask=inside_P, other=0.0), zero_P)
        else:
            scale_P = _half(scale_P)
            if KIND == OFFSETS:
                zero_P = _half(_half(scale_P * code_P - mean_P) * ratio_P)
            scale_P = _half(scale_P * ratio_P)
        best_P = _round_block(
            (factor, table, codes, errors, tried_codes, tried_errors), first, rows_P, scale_P, zero_P, lane_P, num_rows,
            S, W, R, KIND, LARGEST,
        )  # fmt: skip
        tl.store(scales + place_P, scale_P, mask=best_P)
        tl.store(zero_points + place_P, zero_P, mask=best_P)
