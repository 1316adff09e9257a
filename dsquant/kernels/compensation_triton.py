"""`compensation` on a GPU: a thread takes one row with one candidate through all columns of the group.

The group is cut into tiles of columns. What earlier tiles' errors change in a tile is one matrix product; inside a
tile the errors stay in the thread's registers and each column is changed as late as it is read. Results of every
candidate are kept in memory until a second kernel has compared their losses and copied each row's best.

Shape legend: S columns of the group, O rows of the weight, C candidates, B blocks of the group, R rows and Q columns of
a program's tile, K columns of an earlier tile.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import nearest
from dsquant.kernels.values import CompensatedGroup, Levels, Parameters, table_on

# A warp with a row to each thread.
ROWS = 32
WARPS = 1
COLUMNS = 16
COPIED_ROWS = 128
Q: tl.constexpr = tl.constexpr(COLUMNS)


def compensate_group(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, candidates: Parameters, levels: Levels
) -> CompensatedGroup:
    """`compensation.compensate_group` on the weight's GPU, up to the order of sums.

    It needs 5 bytes for each weight and candidate meanwhile.
    """
    (size, num_rows), (num_candidates, _, num_blocks) = weight_SO.shape, candidates.scales.shape
    weight_SO, device = weight_SO.contiguous(), weight_SO.device
    tried = (
        torch.empty(num_candidates, size, num_rows, dtype=torch.uint8, device=device),
        weight_SO.new_empty(num_candidates, size, num_rows),
        weight_SO.new_empty(num_candidates, num_rows),
    )
    parameters = (candidates.scales.contiguous(), candidates.zero_points.contiguous(), table_on(device, levels))
    shape = (num_rows, size, num_blocks, ROWS, levels.largest, int(levels.kind))
    programs = (triton.cdiv(num_rows, ROWS), num_candidates)
    _try[programs](weight_SO, factor_SS.contiguous(), *parameters, *tried, *shape, num_warps=WARPS, num_stages=1)
    best = CompensatedGroup(
        torch.empty_like(weight_SO, dtype=torch.uint8),
        torch.empty_like(weight_SO),
        torch.empty(num_rows, dtype=torch.int64, device=device),
    )
    copies = (best.codes_SO, best.errors_SO, best.chosen_O)
    programs = (triton.cdiv(num_rows, COPIED_ROWS), size // COLUMNS)
    _copy_best[programs](*tried, *copies, num_candidates, num_rows, size, COPIED_ROWS, num_warps=4)
    return best


@triton.jit
def _change_tile(tensors, start, rows_R, num_rows, S: tl.constexpr):
    """Writes a tile's columns, changed by the errors of all before it, to where its own errors will be."""
    weight, factor, errors = tensors
    inside_1R = (rows_R < num_rows)[None, :]
    columns_Q = start + tl.arange(0, Q)
    change_QR = tl.zeros([Q, rows_R.shape[0]], tl.float32)
    for first in range(0, start, Q):
        before_K = first + tl.arange(0, Q)
        factor_QK = tl.load(factor + before_K[None, :] * S + columns_Q[:, None])
        errors_KR = tl.load(errors + before_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        change_QR = tl.dot(factor_QK, errors_KR, change_QR, input_precision="ieee")
    offsets_QR = columns_Q[:, None] * num_rows + rows_R[None, :]
    weight_QR = tl.load(weight + offsets_QR, mask=inside_1R, other=0.0)
    tl.store(errors + offsets_QR, weight_QR - change_QR, mask=inside_1R)


# num_rows unspecialized: its divisors would let a thread load four rows of a column, and then compute all four.
@triton.jit(do_not_specialize=["num_rows"])
def _try(
    weight, factor, scales, zero_points, table, codes, errors, losses, num_rows,
    S: tl.constexpr, B: tl.constexpr, R: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Rounds a program's rows with one candidate."""
    candidate = tl.program_id(1)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    codes += candidate.to(tl.int64) * S * num_rows
    errors += candidate.to(tl.int64) * S * num_rows
    losses_R = tl.zeros([R], tl.float32)
    places_Q = tl.arange(0, Q)
    for start in range(0, S, Q):
        blocks_R = (candidate * num_rows + rows_R) * B + start * B // S
        scales_R = tl.load(scales + blocks_R, mask=inside_R, other=1.0)
        zeros_R = tl.load(zero_points + blocks_R, mask=inside_R, other=0.0)
        _change_tile((weight, factor, errors), start, rows_R, num_rows, S)
        tl.debug_barrier()  # what one thread wrote, another reads
        errors_QR = tl.zeros([Q, R], tl.float32)
        for place in tl.static_range(Q):
            column = start + place
            factor_Q = tl.load(factor + (start + places_Q) * S + column)
            values_R = tl.load(errors + column * num_rows + rows_R, mask=inside_R, other=0.0)
            values_R -= tl.sum(factor_Q[:, None] * errors_QR, 0)
            codes_R, rounded_R = nearest(values_R, scales_R, zeros_R, table, LARGEST, KIND)
            error_R = tl.div_rn(values_R - rounded_R, tl.load(factor + column * S + column))
            errors_QR = tl.where(places_Q[:, None] == place, error_R[None, :], errors_QR)
            losses_R += error_R * error_R
            tl.store(codes + column * num_rows + rows_R, codes_R.to(tl.uint8), mask=inside_R)
            tl.store(errors + column * num_rows + rows_R, error_R, mask=inside_R)
        tl.debug_barrier()
    tl.store(losses + candidate * num_rows + rows_R, losses_R, mask=inside_R)


@triton.jit
def _copy_best(
    tried_codes, tried_errors, losses, codes, errors, chosen, num_candidates, num_rows, S: tl.constexpr, R: tl.constexpr
):
    """Copies each row's results with the candidate of its least loss, the first of equals."""
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    best_R = tl.zeros([R], tl.int32)
    least_R = tl.load(losses + rows_R, mask=inside_R, other=0.0)
    for place in range(1, num_candidates):
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
        tl.store(chosen + rows_R, best_R.to(tl.int64), mask=inside_R)
