"""Plain rounding and what belongs to it on a GPU, each in one pass over memory.

A contiguous weight is a list of blocks one after the other, so a program takes N blocks, whatever rows they are of.

Shape legend: C candidates, O out features, I in features, B blocks along I, S = block size, N blocks of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import INTEGERS, grid_of_range, nearest, weights_of_codes
from dsquant.kernels.values import Levels, Parameters, table_on

# Weights of a program: 16 to a thread; more spill registers.
WEIGHTS = 2048
WARPS = 4


def range_parameters(
    weight_OI: torch.Tensor, group_size: int, levels: Levels, clip_ratios: Sequence[float]
) -> Parameters:
    """`grids.range_parameters` on the weight's GPU."""
    num_rows, num_columns = weight_OI.shape
    per_row = num_columns // group_size
    parameters = Parameters(*weight_OI.new_empty(2, len(clip_ratios), num_rows, per_row))
    tensors = (weight_OI, _on(weight_OI.device, tuple(clip_ratios)), parameters.scales, parameters.zero_points)
    blocks, programs = _blocks(num_rows * per_row, group_size)
    shape = (num_rows, per_row, *weight_OI.stride(), len(clip_ratios), group_size, blocks)
    _range_parameters[programs,](*tensors, *shape, levels.largest, levels.symmetric, num_warps=WARPS)
    return parameters


def round_rows(weight_OI: torch.Tensor, parameters: Parameters, levels: Levels) -> torch.Tensor:
    """`grids.round_rows` on the weight's GPU."""
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    parameters = parameters.each(lambda part: part.float().contiguous())
    _round_blocks(weight_OI.contiguous(), codes_OI, parameters, levels, given=True)
    return codes_OI


def round_to_range(weight_OI: torch.Tensor, group_size: int, levels: Levels) -> tuple[torch.Tensor, Parameters]:
    """`grids.round_to_range` on the weight's GPU."""
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    parameters = Parameters(*weight_OI.new_empty(2, len(weight_OI), weight_OI.shape[1] // group_size))
    _round_blocks(weight_OI.contiguous(), codes_OI, parameters, levels, given=False)
    return codes_OI, parameters


def _round_blocks(
    weight_OI: torch.Tensor, codes_OI: torch.Tensor, parameters: Parameters, levels: Levels, given: bool
) -> None:
    num_blocks = parameters.scales.numel()
    size = weight_OI.numel() // num_blocks
    blocks, programs = _blocks(num_blocks, size)
    tensors = (weight_OI, parameters.scales, parameters.zero_points, table_on(weight_OI.device, levels), codes_OI)
    constants = (size, blocks, levels.largest, int(levels.kind), levels.symmetric, given)
    _round[programs,](*tensors, num_blocks, *constants, num_warps=WARPS)


def dequantize_rows(
    codes_OI: torch.Tensor, parameters: Parameters, levels: Levels, minus_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """`grids.dequantize_rows` on the codes' GPU."""
    codes_OI, parameters = codes_OI.contiguous(), parameters.each(torch.Tensor.contiguous)
    weight_OI = torch.empty_like(codes_OI, dtype=torch.float32)
    num_blocks = parameters.scales.numel()
    size = codes_OI.numel() // num_blocks
    blocks, programs = _blocks(num_blocks, size)
    minus = weight_OI if minus_OI is None else minus_OI.contiguous()
    tensors = (codes_OI, parameters.scales, parameters.zero_points, table_on(codes_OI.device, levels), minus, weight_OI)
    constants = (size, blocks, int(levels.kind), minus_OI is not None)
    _dequantize[programs,](*tensors, num_blocks, *constants, num_warps=WARPS)
    return weight_OI


def fake_quantize_difference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, levels: Levels
) -> torch.Tensor:
    """`grids.fake_quantize_difference` on the weight's GPU."""
    weight_OI = weight_OI.contiguous()
    num_scales, per_row = len(column_scales_CI), weight_OI.shape[1] // group_size
    difference_COI = weight_OI.new_empty(num_scales, *weight_OI.shape)
    num_blocks = weight_OI.numel() // group_size
    blocks, programs = _blocks(num_blocks, group_size)
    tensors = (weight_OI, column_scales_CI.contiguous(), difference_COI)
    constants = (group_size, blocks, levels.largest, levels.symmetric)
    _difference[programs, num_scales](*tensors, num_blocks, per_row, *constants, num_warps=WARPS)
    return difference_COI


def _blocks(num_blocks: int, size: int) -> tuple[int, int]:
    """Blocks of a program, and programs."""
    blocks = max(1, WEIGHTS // size)
    return blocks, triton.cdiv(num_blocks, blocks)


@cache
def _on(device: torch.device, numbers: tuple[float, ...]) -> torch.Tensor:
    """Numbers as float32 on a device, copied there once."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@triton.jit
def _range_parameters(
    weight, ratios, scales, zero_points, num_rows, per_row, row_stride, column_stride, num_ratios,
    S: tl.constexpr, N: tl.constexpr, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = blocks_N < num_rows * per_row
    columns_NS = ((blocks_N % per_row) * S)[:, None] + tl.arange(0, S)[None, :]
    places_NS = (blocks_N // per_row)[:, None] * row_stride + columns_NS * column_stride
    weight_NS = tl.load(weight + places_NS, mask=inside_N[:, None], other=0.0)
    low_N, high_N = tl.min(weight_NS, 1), tl.max(weight_NS, 1)
    for place in range(num_ratios):
        scales_N, zeros_N = grid_of_range(low_N, high_N, tl.load(ratios + place), LARGEST, SYMMETRIC)
        if SYMMETRIC:
            scales_N = tl.where((place > 0) & (high_N > -low_N), -scales_N, scales_N)
        places_N = place * num_rows * per_row + blocks_N
        tl.store(scales + places_N, scales_N, mask=inside_N)
        tl.store(zero_points + places_N, zeros_N, mask=inside_N)


@triton.jit
def _round(
    weight, scales, zero_points, table, codes, num_blocks,
    S: tl.constexpr, N: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """By given parameters, or by those of each group's range, which it stores."""
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = blocks_N < num_blocks
    places_NS = blocks_N[:, None] * S + tl.arange(0, S)[None, :]
    weight_NS = tl.load(weight + places_NS, mask=inside_N[:, None], other=0.0)
    if GIVEN:
        scales_N = tl.load(scales + blocks_N, mask=inside_N, other=1.0)
        zeros_N = tl.load(zero_points + blocks_N, mask=inside_N, other=0.0)
    else:
        scales_N, zeros_N = grid_of_range(tl.min(weight_NS, 1), tl.max(weight_NS, 1), 1.0, LARGEST, SYMMETRIC)
        tl.store(scales + blocks_N, scales_N, mask=inside_N)
        tl.store(zero_points + blocks_N, zeros_N, mask=inside_N)
    codes_NS, _ = nearest(weight_NS, scales_N[:, None], zeros_N[:, None], table, LARGEST, KIND)
    tl.store(codes + places_NS, codes_NS.to(tl.uint8), mask=inside_N[:, None])


@triton.jit
def _dequantize(
    codes, scales, zero_points, table, minus, weight, num_blocks,
    S: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, SUBTRACT: tl.constexpr,
):  # fmt: skip
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N = blocks_N < num_blocks
    places_NS = blocks_N[:, None] * S + tl.arange(0, S)[None, :]
    scales_N = tl.load(scales + blocks_N, mask=inside_N, other=0.0)
    zeros_N = tl.load(zero_points + blocks_N, mask=inside_N, other=0).to(tl.float32)
    codes_NS = tl.load(codes + places_NS, mask=inside_N[:, None], other=0).to(tl.float32)
    # Products are exact (of integers 8 bits times 8), so it does not matter that a difference is fused with them.
    weight_NS = weights_of_codes(codes_NS, scales_N[:, None], zeros_N[:, None], table, KIND)
    if SUBTRACT:
        weight_NS -= tl.load(minus + places_NS, mask=inside_N[:, None], other=0.0)
    tl.store(weight + places_NS, weight_NS, mask=inside_N[:, None])


@triton.jit
def _difference(
    weight, column_scales, difference, num_blocks, per_row,
    S: tl.constexpr, N: tl.constexpr, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N1 = (blocks_N < num_blocks)[:, None]
    columns_S = tl.arange(0, S)[None, :]
    places_NS = blocks_N[:, None] * S + columns_S
    weight_NS = tl.load(weight + places_NS, mask=inside_N1, other=0.0)
    scales_of_row = tl.program_id(1) * per_row * S
    column_scales_NS = tl.load(column_scales + scales_of_row + (blocks_N % per_row)[:, None] * S + columns_S)
    scaled_NS = weight_NS * column_scales_NS
    scales_N, zeros_N = grid_of_range(tl.min(scaled_NS, 1), tl.max(scaled_NS, 1), 1.0, LARGEST, SYMMETRIC)
    _, rounded_NS = nearest(scaled_NS, scales_N[:, None], zeros_N[:, None], weight, LARGEST, INTEGERS)
    rounded_NS = tl.div_rn(rounded_NS, column_scales_NS)
    difference += tl.program_id(1).to(tl.int64) * num_blocks * S
    tl.store(difference + places_NS, rounded_NS - weight_NS, mask=inside_N1)
