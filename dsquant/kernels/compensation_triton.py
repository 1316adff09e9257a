"""`compensation` on a GPU: a thread keeps a row's errors in registers through all columns of the group.

Column j is read as late as it is needed: w_j - sum over k < j of U_kj * e_k, with the errors e so far. A first kernel
runs every row under every shrink and writes only the losses; a second runs each row's best again and writes the
result.

Shape legend: S columns of the group, O rows of the weight, C shrinks, R rows of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from dsquant.kernels.compensation import CompensatedGroup
from dsquant.kernels.grids_triton import centred_codes, grid_of_range

# Rows of a program, one to a thread.
ROWS = 32
WARPS = 1


def compensate_group(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> CompensatedGroup:
    """Rounds a group's columns on their GPU.

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
    weight_SO, factor_of_column_SS = weight_SO.contiguous(), factor_SS.T.contiguous()
    shrinks_C = shrinks_on(weight_SO.device, tuple(shrinks))
    losses_CO = weight_SO.new_empty(len(shrinks), num_rows)
    group = CompensatedGroup(
        torch.empty_like(weight_SO, dtype=torch.uint8),
        torch.empty_like(weight_SO),
        weight_SO.new_empty(num_rows),
        torch.empty(num_rows, dtype=torch.uint8, device=weight_SO.device),
    )
    shape = (len(shrinks), num_rows, size, ROWS, bits, symmetric)
    programs = triton.cdiv(num_rows, ROWS)
    inputs = (weight_SO, factor_of_column_SS, shrinks_C, losses_CO)
    _losses[programs, len(shrinks)](*inputs, *shape[1:], num_warps=WARPS)
    outputs = (group.codes_SO, group.errors_SO, group.scales_O, group.zero_points_O)
    _best[programs,](*inputs, *outputs, *shape, num_warps=WARPS)
    return group


@cache
def shrinks_on(device: torch.device, shrinks: tuple[float, ...]) -> torch.Tensor:
    """The shrinks as float32 on a device, copied there once."""
    return torch.tensor(shrinks, dtype=torch.float32, device=device)


@triton.jit
def _grid_of_rows(weight, shrink, rows_R, num_rows, S: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    offsets_SR = tl.arange(0, S)[:, None] * num_rows + rows_R[None, :]
    weight_SR = tl.load(weight + offsets_SR, mask=(rows_R < num_rows)[None, :], other=0.0)
    return grid_of_range(tl.min(weight_SR, 0), tl.max(weight_SR, 0), shrink, BITS, SYMMETRIC)


@triton.jit
def _round_column(
    weight, factor, errors_SR, column, rows_R, num_rows, scales_R, zeros_R, S: tl.constexpr, BITS: tl.constexpr
):
    """The column's centred codes, its errors over U_jj, and the errors of all columns so far."""
    columns_S = tl.arange(0, S)
    factor_S = tl.load(factor + column * S + columns_S)
    values_R = tl.load(weight + column * num_rows + rows_R, mask=rows_R < num_rows, other=0.0)
    values_R -= tl.sum(factor_S[:, None] * errors_SR, 0)
    codes_R = centred_codes(values_R, scales_R, zeros_R, BITS)
    error_R = tl.div_rn(values_R - codes_R * scales_R, tl.load(factor + column * S + column))
    return codes_R, error_R, tl.where(columns_S[:, None] == column, error_R[None, :], errors_SR)


@triton.jit
def _losses(
    weight,
    factor,
    shrinks,
    losses,
    num_rows,
    S: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """The summed squared errors of a program's rows under one shrink."""
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    shrink = tl.load(shrinks + tl.program_id(1))
    scales_R, zeros_R = _grid_of_rows(weight, shrink, rows_R, num_rows, S, BITS, SYMMETRIC)
    errors_SR = tl.zeros([S, R], tl.float32)
    losses_R = tl.zeros([R], tl.float32)
    for column in range(S):
        _, error_R, errors_SR = _round_column(
            weight, factor, errors_SR, column, rows_R, num_rows, scales_R, zeros_R, S, BITS
        )
        losses_R += error_R * error_R
    tl.store(losses + tl.program_id(1) * num_rows + rows_R, losses_R, mask=rows_R < num_rows)


@triton.jit
def _best(
    weight,
    factor,
    shrinks,
    losses,
    codes,
    errors,
    scales,
    zero_points,
    num_shrinks,
    num_rows,
    S: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Rounds each row under the shrink of its least loss."""
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    least_R = tl.load(losses + rows_R, mask=inside_R, other=0.0)
    shrink_R = tl.zeros([R], tl.float32) + tl.load(shrinks)
    for place in range(1, num_shrinks):
        losses_R = tl.load(losses + place * num_rows + rows_R, mask=inside_R, other=0.0)
        shrink_R = tl.where(losses_R < least_R, tl.load(shrinks + place), shrink_R)
        least_R = tl.minimum(losses_R, least_R)
    scales_R, zeros_R = _grid_of_rows(weight, shrink_R, rows_R, num_rows, S, BITS, SYMMETRIC)
    errors_SR = tl.zeros([S, R], tl.float32)
    for column in range(S):
        codes_R, error_R, errors_SR = _round_column(
            weight, factor, errors_SR, column, rows_R, num_rows, scales_R, zeros_R, S, BITS
        )
        tl.store(codes + column * num_rows + rows_R, (codes_R + zeros_R).to(tl.uint8), mask=inside_R)
        tl.store(errors + column * num_rows + rows_R, error_R, mask=inside_R)
    tl.store(scales + rows_R, scales_R, mask=inside_R)
    tl.store(zero_points + rows_R, zeros_R.to(tl.uint8), mask=inside_R)
