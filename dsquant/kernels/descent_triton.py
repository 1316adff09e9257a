"""`descent` on a GPU: a thread takes one row through the whole group.

The group is cut into blocks of columns, as in `compensation_triton`. What the codes' own spread gives for the scale is
products of blocks; so is what changes in earlier blocks do to a block's gradient. Inside a block changes stay in
registers and a gradient is brought up to date as late as it is read.

Shape legend: S columns of the group, O rows of the weight, R rows and Q columns of a program's block, K columns of
another block.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import ROUNDER, storable_scales
from dsquant.kernels.values import DescendingGroup

# A warp with a row to each thread.
ROWS = 32
WARPS = 1
COLUMNS = 16


def descend_group(
    group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, maximum_code: int, symmetric: bool
) -> torch.Tensor:
    """Moves a group on its GPU.

    Args:
        group: as for `descent.descend_group`.
        gradient_SO: as for `descent.descend_group`; contiguous.
        gram_SS: as for `descent.descend_group`; contiguous.
        maximum_code: as for `descent.descend_group`.
        symmetric: as for `descent.descend_group`.

    Returns:
        As `descent.descend_group`, up to the order of sums.
    """
    size, num_rows = gradient_SO.shape
    working_SO, changes_SO = torch.empty_like(gradient_SO), torch.empty_like(gradient_SO)
    tensors = (group.codes_SO, group.scales_O, group.zero_points_O, gradient_SO, gram_SS, working_SO, changes_SO)
    shape = (num_rows, maximum_code, symmetric, size, ROWS, COLUMNS)
    _descend[(triton.cdiv(num_rows, ROWS),)](*tensors, *shape, num_warps=WARPS, num_stages=1)
    return changes_SO


@triton.jit
def _block(matrix, start, rows_R, num_rows, Q: tl.constexpr):
    """Columns `start` to `start + Q` of a program's rows, [Q, R]."""
    offsets_QR = (start + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
    return tl.load(matrix + offsets_QR, mask=(rows_R < num_rows)[None, :], other=0.0)


@triton.jit
def _gram_block(gram, start, first, S: tl.constexpr, Q: tl.constexpr):
    """Rows `start` to `start + Q` of H, columns `first` to `first + Q`."""
    return tl.load(gram + (start + tl.arange(0, Q))[:, None] * S + (first + tl.arange(0, Q))[None, :])


@triton.jit
def _fit_scales(codes, gradient, gram, working, scales_R, zeros_R, rows_R, num_rows, S: tl.constexpr, Q: tl.constexpr):
    """Each row's change of scale; leaves H u in `working`, and sums the gradient's columns beside it."""
    curvature_R = tl.zeros(scales_R.shape, tl.float32)
    slope_R = tl.zeros(scales_R.shape, tl.float32)
    for start in range(0, S, Q):
        spread_QR = tl.zeros([Q, rows_R.shape[0]], tl.float32)
        for first in range(0, S, Q):
            centred_KR = _block(codes, first, rows_R, num_rows, Q) - zeros_R[None, :]
            gram_QK = _gram_block(gram, start, first, S, Q)
            spread_QR = tl.dot(gram_QK, centred_KR, spread_QR, input_precision="tf32x3")
        centred_QR = _block(codes, start, rows_R, num_rows, Q) - zeros_R[None, :]
        curvature_R += tl.sum(spread_QR * centred_QR, 0)
        slope_R += tl.sum(_block(gradient, start, rows_R, num_rows, Q) * centred_QR, 0)
        offsets_QR = (start + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
        tl.store(working + offsets_QR, spread_QR, mask=(rows_R < num_rows)[None, :])
    steps_R = tl.div_rn(slope_R, tl.where(curvature_R > 0, curvature_R, 1.0))
    change_R = storable_scales(scales_R - steps_R) - scales_R
    falls_R = (curvature_R > 0) & (2 * change_R * slope_R + change_R * change_R * curvature_R < 0)
    return tl.where(falls_R, change_R, 0.0)


@triton.jit
def _fit_zero_points(
    gradient, gram, working, scale_change_R, scales_R, zeros_R, rows_R, num_rows, maximum_code, S, Q: tl.constexpr
):
    """Each row's new zero point and what all its weights change by."""
    slope_R = tl.zeros(scales_R.shape, tl.float32)
    curvature = 0.0
    for start in range(0, S, Q):
        slope_R += tl.sum(_block(gradient, start, rows_R, num_rows, Q), 0)
        slope_R += scale_change_R * tl.sum(_block(working, start, rows_R, num_rows, Q), 0)
        for first in range(0, S, Q):
            curvature += tl.sum(tl.sum(_gram_block(gram, start, first, S, Q), 1), 0)
    total_R = tl.zeros(scales_R.shape, tl.float32)
    for direction in tl.static_range(2):
        step = 1.0 - 2.0 * direction
        change_R = -step * scales_R
        gain_R = 2 * change_R * slope_R + change_R * change_R * curvature
        falls_R = (gain_R < 0) & (zeros_R + step >= 0) & (zeros_R + step <= maximum_code)
        change_R = tl.where(falls_R, change_R, 0.0)
        zeros_R = tl.where(falls_R, zeros_R + step, zeros_R)
        slope_R += change_R * curvature
        total_R += change_R
    return zeros_R, total_R


@triton.jit
def _block_gradient(
    gradient,
    gram,
    working,
    scale_change_R,
    zero_change_R,
    start,
    rows_R,
    num_rows,
    SYMMETRIC: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
):
    """Writes a block's gradient, after all that has changed before it, to where its own changes will be.

    There H u has been; in earlier blocks of `working` are the changes that their codes have made.
    """
    gradient_QR = _block(gradient, start, rows_R, num_rows, Q)
    gradient_QR += scale_change_R[None, :] * _block(working, start, rows_R, num_rows, Q)
    if not SYMMETRIC:
        spread_Q = tl.zeros([Q], tl.float32)
        for first in range(0, S, Q):
            spread_Q += tl.sum(_gram_block(gram, start, first, S, Q), 1)
        gradient_QR += spread_Q[:, None] * zero_change_R[None, :]
    for first in range(0, start, Q):
        gram_QK = _gram_block(gram, start, first, S, Q)
        gradient_QR = tl.dot(
            gram_QK, _block(working, first, rows_R, num_rows, Q), gradient_QR, input_precision="tf32x3"
        )
    offsets_QR = (start + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
    tl.store(working + offsets_QR, gradient_QR, mask=(rows_R < num_rows)[None, :])


# num_rows unspecialized: its divisors would let a thread load four rows of a column, and then compute all four.
@triton.jit(do_not_specialize=["num_rows"])
def _descend(
    codes,
    scales,
    zero_points,
    gradient,
    gram,
    working,
    changes,
    num_rows,
    maximum_code,
    SYMMETRIC: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
):
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    first_scales_R = tl.load(scales + rows_R, mask=inside_R, other=1.0)
    first_zeros_R = tl.load(zero_points + rows_R, mask=inside_R, other=0.0)
    scale_change_R = _fit_scales(codes, gradient, gram, working, first_scales_R, first_zeros_R, rows_R, num_rows, S, Q)
    tl.debug_barrier()  # what one thread wrote, another reads
    scales_R, zeros_R, zero_change_R = first_scales_R + scale_change_R, first_zeros_R, tl.zeros([R], tl.float32)
    if not SYMMETRIC:
        zeros_R, zero_change_R = _fit_zero_points(
            gradient, gram, working, scale_change_R, scales_R, zeros_R, rows_R, num_rows, maximum_code, S, Q
        )
    places_Q = tl.arange(0, Q)
    for start in range(0, S, Q):
        _block_gradient(
            gradient, gram, working, scale_change_R, zero_change_R, start, rows_R, num_rows, SYMMETRIC, S, Q
        )
        tl.debug_barrier()
        changes_QR = tl.zeros([Q, R], tl.float32)
        for place in tl.static_range(Q):
            column = start + place
            gram_Q = tl.load(gram + (start + places_Q) * S + column)
            gradient_R = tl.load(working + column * num_rows + rows_R, mask=inside_R, other=0.0)
            gradient_R += tl.sum(gram_Q[:, None] * changes_QR, 0)
            before_R = tl.load(codes + column * num_rows + rows_R, mask=inside_R, other=0.0)
            step = tl.div_rn(1.0, tl.load(gram + column * S + column))
            wanted_R = before_R - tl.div_rn(gradient_R * step, scales_R)
            after_R = (tl.minimum(tl.maximum(wanted_R, 0.0), maximum_code) + ROUNDER) - ROUNDER
            change_R = (after_R - before_R) * scales_R
            changes_QR = tl.where(places_Q[:, None] == place, change_R[None, :], changes_QR)
            moved_R = (after_R - zeros_R) * scales_R - (before_R - first_zeros_R) * first_scales_R
            tl.store(codes + column * num_rows + rows_R, after_R, mask=inside_R)
            tl.store(working + column * num_rows + rows_R, change_R, mask=inside_R)
            tl.store(changes + column * num_rows + rows_R, moved_R, mask=inside_R)
        tl.debug_barrier()
    tl.store(scales + rows_R, scales_R, mask=inside_R)
    tl.store(zero_points + rows_R, zeros_R, mask=inside_R)
