"""`compensation` on a GPU: a thread takes one row under one shrink through all columns of the group.

The group is cut into blocks of columns. What earlier blocks' errors change in a block is one matrix product; inside a
block the errors stay in the thread's registers and each column is changed as late as it is read. Results of every
shrink are kept in memory until a second kernel has compared their losses and copied each row's best.

Shape legend: S columns of the group, O rows of the weight, C shrinks, R rows and Q columns of a program's block, K
columns of an earlier block.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import centred_codes, grid_of_range
from dsquant.kernels.values import CompensatedGroup

# A warp with a row to each thread.
ROWS = 32
WARPS = 1
COLUMNS = 16
COPIED_ROWS = 128


def compensate_group(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> CompensatedGroup:
    """Rounds a group's columns on their GPU; needs 5 bytes for each weight and shrink meanwhile.

    Args:
        weight_SO: as for `compensation.compensate_group`.
        factor_SS: as for `compensation.compensate_group`.
        shrinks: as for `compensation.compensate_group`.
        bits: as for `compensation.compensate_group`.
        symmetric: as for `compensation.compensate_group`.

    Returns:
        As `compensation.compensate_group`, up to the order of sums.
    """
    size, num_rows = weight_SO.shape
    weight_SO, num_shrinks = weight_SO.contiguous(), len(shrinks)
    tried = (
        torch.empty(num_shrinks, size, num_rows, dtype=torch.uint8, device=weight_SO.device),
        weight_SO.new_empty(num_shrinks, size, num_rows),
        *weight_SO.new_empty(3, num_shrinks, num_rows),
    )
    inputs = (weight_SO, factor_SS.contiguous(), shrinks_on(weight_SO.device, tuple(shrinks)))
    shape = (num_rows, size, ROWS, COLUMNS, bits, symmetric)
    _try_shrinks[triton.cdiv(num_rows, ROWS), num_shrinks](*inputs, *tried, *shape, num_warps=WARPS, num_stages=1)
    best = CompensatedGroup(
        torch.empty_like(weight_SO, dtype=torch.uint8),
        torch.empty_like(weight_SO),
        weight_SO.new_empty(num_rows),
        torch.empty(num_rows, dtype=torch.uint8, device=weight_SO.device),
    )
    copies = (best.codes_SO, best.errors_SO, best.scales_O, best.zero_points_O)
    programs = (triton.cdiv(num_rows, COPIED_ROWS), size // COLUMNS)
    _copy_best[programs](*tried, *copies, num_shrinks, num_rows, size, COPIED_ROWS, COLUMNS, num_warps=4)
    return best


@cache
def shrinks_on(device: torch.device, shrinks: tuple[float, ...]) -> torch.Tensor:
    """The shrinks as float32 on a device, copied there once."""
    return torch.tensor(shrinks, dtype=torch.float32, device=device)


@triton.jit
def _grid_of_rows(
    weight, shrink, rows_R, num_rows, S: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr
):
    low_R = tl.full(rows_R.shape, float("inf"), tl.float32)
    high_R = -low_R
    for first in range(0, S, Q):
        offsets_QR = (first + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
        weight_QR = tl.load(weight + offsets_QR, mask=(rows_R < num_rows)[None, :], other=0.0)
        low_R = tl.minimum(low_R, tl.min(weight_QR, 0))
        high_R = tl.maximum(high_R, tl.max(weight_QR, 0))
    return grid_of_range(low_R, high_R, shrink, BITS, SYMMETRIC)


@triton.jit
def _change_block(weight, factor, errors, start, rows_R, num_rows, S: tl.constexpr, Q: tl.constexpr):
    """Writes a block's columns, changed by the errors of all before it, to where its own errors will be."""
    inside_1R = (rows_R < num_rows)[None, :]
    columns_Q = start + tl.arange(0, Q)
    change_QR = tl.zeros([Q, rows_R.shape[0]], tl.float32)
    for first in range(0, start, Q):
        before_K = first + tl.arange(0, Q)
        factor_QK = tl.load(factor + before_K[None, :] * S + columns_Q[:, None])
        errors_KR = tl.load(errors + before_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        change_QR = tl.dot(factor_QK, errors_KR, change_QR, input_precision="tf32x3")
    offsets_QR = columns_Q[:, None] * num_rows + rows_R[None, :]
    weight_QR = tl.load(weight + offsets_QR, mask=inside_1R, other=0.0)
    tl.store(errors + offsets_QR, weight_QR - change_QR, mask=inside_1R)


# num_rows unspecialized: its divisors would let a thread load four rows of a column, and then compute all four.
@triton.jit(do_not_specialize=["num_rows"])
def _try_shrinks(
    weight,
    factor,
    shrinks,
    codes,
    errors,
    losses,
    scales,
    zero_points,
    num_rows,
    S: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Rounds a program's rows under one shrink."""
    shrink_place = tl.program_id(1)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    scales_R, zeros_R = _grid_of_rows(weight, tl.load(shrinks + shrink_place), rows_R, num_rows, S, Q, BITS, SYMMETRIC)
    codes += shrink_place.to(tl.int64) * S * num_rows
    errors += shrink_place.to(tl.int64) * S * num_rows
    losses_R = tl.zeros([R], tl.float32)
    places_Q = tl.arange(0, Q)
    for start in range(0, S, Q):
        _change_block(weight, factor, errors, start, rows_R, num_rows, S, Q)
        tl.debug_barrier()  # what one thread wrote, another reads
        errors_QR = tl.zeros([Q, R], tl.float32)
        for place in tl.static_range(Q):
            column = start + place
            factor_Q = tl.load(factor + (start + places_Q) * S + column)
            values_R = tl.load(errors + column * num_rows + rows_R, mask=inside_R, other=0.0)
            values_R -= tl.sum(factor_Q[:, None] * errors_QR, 0)
            codes_R = centred_codes(values_R, scales_R, zeros_R, BITS)
            error_R = tl.div_rn(values_R - codes_R * scales_R, tl.load(factor + column * S + column))
            errors_QR = tl.where(places_Q[:, None] == place, error_R[None, :], errors_QR)
            losses_R += error_R * error_R
            tl.store(codes + column * num_rows + rows_R, (codes_R + zeros_R).to(tl.uint8), mask=inside_R)
            tl.store(errors + column * num_rows + rows_R, error_R, mask=inside_R)
        tl.debug_barrier()
    offsets_R = shrink_place * num_rows + rows_R
    tl.store(losses + offsets_R, losses_R, mask=inside_R)
    tl.store(scales + offsets_R, scales_R, mask=inside_R)
    tl.store(zero_points + offsets_R, zeros_R, mask=inside_R)


@triton.jit
def _copy_best(
    tried_codes,
    tried_errors,
    losses,
    tried_scales,
    tried_zero_points,
    codes,
    errors,
    scales,
    zero_points,
    num_shrinks,
    num_rows,
    S: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
):
    """Copies each row's results under the shrink of its least loss, the first of equals."""
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    best_R = tl.zeros([R], tl.int32)
    least_R = tl.load(losses + rows_R, mask=inside_R, other=0.0)
    for place in range(1, num_shrinks):
        losses_R = tl.load(losses + place * num_rows + rows_R, mask=inside_R, other=0.0)
        best_R = tl.where(losses_R < least_R, place, best_R)
        least_R = tl.minimum(losses_R, least_R)
    columns_Q = tl.program_id(1) * Q + tl.arange(0, Q)
    offsets_QR = columns_Q[:, None] * num_rows + rows_R[None, :]
    tried_QR = (best_R.to(tl.int64) * S * num_rows)[None, :] + offsets_QR
    inside_1R = inside_R[None, :]
    tl.store(codes + offsets_QR, tl.load(tried_codes + tried_QR, mask=inside_1R), mask=inside_1R)
    tl.store(errors + offsets_QR, tl.load(tried_errors + tried_QR, mask=inside_1R), mask=inside_1R)
    if tl.program_id(1) == 0:
        tried_R = best_R * num_rows + rows_R
        zeros_R = tl.load(tried_zero_points + tried_R, mask=inside_R).to(tl.uint8)
        tl.store(scales + rows_R, tl.load(tried_scales + tried_R, mask=inside_R), mask=inside_R)
        tl.store(zero_points + rows_R, zeros_R, mask=inside_R)
