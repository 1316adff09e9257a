"""`scale_search` on a GPU: a program keeps its blocks in registers through all candidates.

Shape legend: N blocks of a program, W weights of a block, S super-blocks of a program, B blocks of a super-block.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels import scale_candidates
from dsquant.kernels.grids_triton import ROUNDER, TABLE, nearest_level
from dsquant.kernels.values import Levels, numbers_on, table_on

AFFINE_FIRST = tl.constexpr(scale_candidates.AFFINE_FIRST)
AFFINE_STEP = tl.constexpr(scale_candidates.AFFINE_STEP)
AFFINE_TRIES = tl.constexpr(scale_candidates.AFFINE_TRIES)
LEAST = tl.constexpr(scale_candidates.LEAST)
BETTER = tl.constexpr(scale_candidates.BETTER)
SCALE_FIRST = tl.constexpr(scale_candidates.SCALE_FIRST)
SCALE_STEP = tl.constexpr(scale_candidates.SCALE_STEP)
SCALE_TRIES = tl.constexpr(scale_candidates.SCALE_TRIES)
LARGEST_SCALE = tl.constexpr(scale_candidates.LARGEST_SCALE)
# Weights of a program of one warp: 16 to a thread.
WEIGHTS = 512
SUPER_BLOCKS = 32


def affine_search(
    weight_WN: torch.Tensor, weights_WN: torch.Tensor, steps: int, signed: bool
) -> tuple[torch.Tensor, ...]:
    """`scale_search.affine_search` on the weights' GPU, up to the order of sums."""
    size, num_blocks = weight_WN.shape
    scale_N, code_N, mean_N = found = weight_WN.new_empty(3, num_blocks)
    del found
    blocks, strides = WEIGHTS // size, (*weight_WN.stride(), *weights_WN.stride())
    programs = (triton.cdiv(num_blocks, blocks),)
    tensors = (weight_WN, weights_WN, scale_N, code_N, mean_N)
    _affine[programs](*tensors, num_blocks, *strides, size, blocks, steps, signed, num_warps=1)
    return scale_N, code_N, mean_N


def symmetric_search(weight_WN: torch.Tensor, weights_WN: torch.Tensor, levels: Levels) -> torch.Tensor:
    """`scale_search.symmetric_search` on the weights' GPU, up to the order of sums."""
    size, num_blocks = weight_WN.shape
    scale_N, device = weight_WN.new_empty(num_blocks), weight_WN.device
    blocks, strides = WEIGHTS // size, (*weight_WN.stride(), *weights_WN.stride())
    candidates = candidates_on(device, levels)
    tensors = (weight_WN, weights_WN, candidates, table_on(device, levels), scale_N)
    shape = (len(candidates), size, blocks, levels.middle, levels.largest, int(levels.kind))
    _symmetric[triton.cdiv(num_blocks, blocks),](*tensors, num_blocks, *strides, *shape, num_warps=1)
    return scale_N


def stored_factors(
    values_SB: torch.Tensor, shares_SB: torch.Tensor, codes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_search.scale_search` on the values' GPU, up to the order of sums."""
    values_SB, shares_SB = values_SB.contiguous(), shares_SB.contiguous()
    num_supers, blocks = values_SB.shape
    factor_S1 = torch.empty(num_supers, 1, dtype=torch.float16, device=values_SB.device)
    codes_SB = torch.empty_like(values_SB)
    programs = (triton.cdiv(num_supers, SUPER_BLOCKS),)
    tensors = (values_SB, shares_SB, factor_S1, codes_SB)
    _factors[programs](*tensors, num_supers, blocks, SUPER_BLOCKS, *codes, num_warps=1)
    return factor_S1, codes_SB


def candidates_on(device: torch.device, levels: Levels) -> torch.Tensor:
    """The numbers of `scale_candidates.symmetric_candidates`, float32."""
    return numbers_on(device, tuple(scale_candidates.symmetric_candidates(levels)))


@triton.jit
def rounded(values):
    return (values + ROUNDER) - ROUNDER


@triton.jit
def furthest(largest, smallest):
    return tl.where(largest >= -smallest, largest, smallest)


@triton.jit
def affine_lines(weight_NW, weights_NW, N: tl.constexpr, STEPS: tl.constexpr, SIGNED: tl.constexpr):
    """As `scale_search.affine_search`; the weights of the errors sum to one."""
    low_N = tl.min(weight_NW, 1)
    if not SIGNED:
        low_N = tl.minimum(low_N, 0.0)
    range_N = tl.max(weight_NW, 1) - low_N
    safe_range_N = tl.maximum(range_N, LEAST)
    unit_NW = (weight_NW - low_N[:, None]) / safe_range_N[:, None]
    mean_N = tl.sum(weights_NW * unit_NW, 1)
    centred_NW = unit_NW - mean_N[:, None]
    above_N = tl.maximum(mean_N + low_N / safe_range_N, 0.0)
    if SIGNED:
        above_N = tl.full([N], -1e9, tl.float32)  # below any line; an infinity would make NaNs of zeros
    best_N = tl.zeros([N], tl.float32)
    slope_N = tl.full([N], 1 / STEPS, tl.float32)
    best_code_N = tl.zeros([N], tl.float32)
    for number in range(AFFINE_TRIES):
        codes_NW = tl.minimum(rounded(unit_NW * (STEPS + AFFINE_FIRST + AFFINE_STEP * number)), STEPS)
        weighted_NW = weights_NW * codes_NW
        code_N = tl.sum(weighted_NW, 1)
        square_N = tl.maximum(tl.sum(weighted_NW * codes_NW, 1), LEAST)
        product_N = tl.sum(weighted_NW * centred_NW, 1)
        slope = product_N / tl.maximum(square_N - code_N * code_N, LEAST)
        fixed = slope * code_N < above_N
        product_N = tl.where(fixed, product_N + above_N * code_N, product_N)
        slope = tl.where(fixed, product_N / square_N, slope)
        gain_N = slope * product_N - tl.where(fixed, above_N * above_N, 0.0)
        better = gain_N > best_N
        best_N = tl.where(better, gain_N, best_N)
        slope_N = tl.where(better, slope, slope_N)
        best_code_N = tl.where(better, code_N, best_code_N)
    return slope_N * range_N, best_code_N, low_N + mean_N * range_N


@triton.jit
def _load(values, blocks_N, num_blocks, weight_stride, block_stride, W: tl.constexpr, OTHER: tl.constexpr):
    places_NW = blocks_N[:, None] * block_stride + tl.arange(0, W)[None, :] * weight_stride
    return tl.load(values + places_NW, mask=(blocks_N < num_blocks)[:, None], other=OTHER)


@triton.jit
def _affine(
    weight, weights, scales, codes, means, num_blocks,
    weight_stride, block_stride, weights_weight_stride, weights_block_stride,
    W: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = blocks_N < num_blocks
    weight_NW = _load(weight, blocks_N, num_blocks, weight_stride, block_stride, W, 0.0)
    weights_NW = _load(weights, blocks_N, num_blocks, weights_weight_stride, weights_block_stride, W, 1.0)
    weights_NW = weights_NW / tl.maximum(tl.sum(weights_NW, 1), LEAST)[:, None]
    scale_N, code_N, mean_N = affine_lines(weight_NW, weights_NW, N, STEPS, SIGNED)
    tl.store(scales + blocks_N, scale_N, mask=inside_N)
    tl.store(codes + blocks_N, code_N, mask=inside_N)
    tl.store(means + blocks_N, mean_N, mask=inside_N)


@triton.jit
def _symmetric(
    weight, weights, candidates, table, scales, num_blocks,
    weight_stride, block_stride, weights_weight_stride, weights_block_stride, num_candidates,
    W: tl.constexpr, N: tl.constexpr, MIDDLE: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    weight_NW = _load(weight, blocks_N, num_blocks, weight_stride, block_stride, W, 0.0)
    weights_NW = _load(weights, blocks_N, num_blocks, weights_weight_stride, weights_block_stride, W, 1.0)
    weights_NW = weights_NW / tl.maximum(tl.sum(weights_NW, 1), LEAST)[:, None]
    extreme_N = furthest(tl.max(weight_NW, 1), tl.min(weight_NW, 1))
    inverse_N = tl.where(extreme_N != 0, -1 / tl.where(extreme_N != 0, extreme_N, 1.0), 0.0)
    unit_NW = weight_NW * inverse_N[:, None]
    best_N = tl.zeros([N], tl.float32)
    scale_N = tl.zeros([N], tl.float32)
    for number in range(num_candidates):
        values_NW = unit_NW * tl.load(candidates + number)
        if KIND == TABLE:
            _, levels_NW = nearest_level(values_NW, table, LARGEST, KIND)
        else:
            levels_NW = tl.minimum(tl.maximum(rounded(values_NW), -MIDDLE + 0.0), LARGEST - MIDDLE + 0.0)
        weighted_NW = weights_NW * levels_NW
        product_N = tl.sum(weighted_NW * unit_NW, 1)
        scale = product_N / tl.maximum(tl.sum(weighted_NW * levels_NW, 1), LEAST)
        better = scale * product_N > best_N * BETTER
        best_N = tl.where(better, scale * product_N, best_N)
        scale_N = tl.where(better, scale, scale_N)
    tl.store(scales + blocks_N, scale_N * -extreme_N, mask=blocks_N < num_blocks)


@triton.jit
def _factors(
    values, shares, factors, codes, num_supers,
    B: tl.constexpr, S: tl.constexpr, LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr,
):  # fmt: skip
    supers_S = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    inside_S1 = (supers_S < num_supers)[:, None]
    places_SB = supers_S[:, None] * B + tl.arange(0, B)[None, :]
    values_SB = tl.load(values + places_SB, mask=inside_S1, other=0.0)
    shares_SB = tl.load(shares + places_SB, mask=inside_S1, other=1.0)
    shares_SB = shares_SB / tl.maximum(tl.sum(shares_SB, 1), LEAST)[:, None]
    reach: tl.constexpr = -LEAST_CODE if LEAST_CODE < 0 else LARGEST_CODE
    extreme_S = tl.max(values_SB, 1)
    if LEAST_CODE < 0:
        extreme_S = -furthest(extreme_S, tl.min(values_SB, 1))
    safe_extreme_S = tl.where(tl.abs(extreme_S) < LEAST, LEAST, extreme_S)
    unit_SB = values_SB / safe_extreme_S[:, None]
    best_S = tl.full([S], float("inf"), tl.float32)
    best_factor_S = tl.zeros([S], tl.float16)
    best_codes_SB = tl.zeros_like(unit_SB)
    for number in range(SCALE_TRIES):
        tried = reach + (SCALE_FIRST + SCALE_STEP * number) * (reach / LARGEST_SCALE)
        codes_SB = tl.minimum(tl.maximum(rounded(unit_SB * tried), LEAST_CODE + 0.0), LARGEST_CODE + 0.0)
        weighted_SB = shares_SB * codes_SB
        square_S = tl.maximum(tl.sum(weighted_SB * codes_SB, 1), LEAST)
        factor_S = (tl.sum(weighted_SB * unit_SB, 1) / square_S * extreme_S).to(tl.float16)
        stored_S = factor_S.to(tl.float32) / safe_extreme_S
        inverse_S = 1 / tl.maximum(stored_S, LEAST)
        codes_SB = tl.minimum(tl.maximum(unit_SB * inverse_S[:, None], LEAST_CODE + 0.0), LARGEST_CODE + 0.0)
        codes_SB = rounded(codes_SB)
        rest_SB = unit_SB - stored_S[:, None] * codes_SB
        error_S = tl.sum(shares_SB * rest_SB * rest_SB, 1)
        better = error_S < best_S
        best_S = tl.where(better, error_S, best_S)
        best_factor_S = tl.where(better, factor_S, best_factor_S)
        best_codes_SB = tl.where(better[:, None], codes_SB, best_codes_SB)
    tl.store(factors + supers_S, best_factor_S, mask=supers_S < num_supers)
    tl.store(codes + places_SB, best_codes_SB, mask=inside_S1)
