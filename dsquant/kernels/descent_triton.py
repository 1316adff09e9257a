"""`descent` on a GPU: a warp takes some rows through the whole block.

The block is cut into tiles of columns, as a group is in `compensation_triton`. What the levels' own spread gives for
the scale is products of tiles; so is what changes in earlier tiles do to a tile's gradient. Inside a tile changes stay
in registers and a gradient is brought up to date as late as it is read.

Shape legend: S columns of the block, O rows of the weight, R rows and Q columns of a program's tile, K columns of
another tile.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import nearest_level, storable_scales
from dsquant.kernels.values import DescendingBlock, Levels, table_on

# Rows and columns of a tile: measured on an H200 with 8 to 64 rows, 16 and 32 columns, one to four warps. The second is
# for blocks that the first does not divide.
TILE = 16, 32
SMALL_TILE = 32, 16
WARPS = 1


def descend_block(
    block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """`descent.descend_block` on the block's GPU, up to the order of sums."""
    size, num_rows = gradient_SO.shape
    working_SO, changes_SO = torch.empty_like(gradient_SO), torch.empty_like(gradient_SO)
    state = (block.levels_SO, block.scales_O, block.zero_points_O, table_on(gradient_SO.device, levels))
    moves = 0 if not levels.movable else 1 if levels.symmetric else 2  # scales; zero points too
    rows, columns = SMALL_TILE if size % TILE[1] else TILE
    shape = (num_rows, size, levels.largest, int(levels.kind), moves, rows, columns)
    programs = (triton.cdiv(num_rows, rows),)
    _descend[programs](*state, gradient_SO, gram_SS, working_SO, changes_SO, *shape, num_warps=WARPS, num_stages=1)
    return changes_SO


@triton.jit
def _tile(matrix, start, rows_R, num_rows, Q: tl.constexpr):
    """Columns `start` to `start + Q` of a program's rows, [Q, R]."""
    offsets_QR = (start + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
    return tl.load(matrix + offsets_QR, mask=(rows_R < num_rows)[None, :], other=0.0)


@triton.jit
def _store_tile(matrix, tile_QR, start, rows_R, num_rows):
    Q: tl.constexpr = tile_QR.shape[0]
    offsets_QR = (start + tl.arange(0, Q))[:, None] * num_rows + rows_R[None, :]
    tl.store(matrix + offsets_QR, tile_QR, mask=(rows_R < num_rows)[None, :])


@triton.jit
def _gram_tile(gram, start, first, S: tl.constexpr, Q: tl.constexpr):
    """Rows `start` to `start + Q` of H, columns `first` to `first + Q`."""
    return tl.load(gram + (start + tl.arange(0, Q))[:, None] * S + (first + tl.arange(0, Q))[None, :])


@triton.jit
def _fit_scales(block, state, rows, S: tl.constexpr, Q: tl.constexpr):
    """Each row's change of scale; leaves H u in `working`, and sums the gradient's columns."""
    levels, gradient, gram, working = block
    scales_R, zeros_R = state
    rows_R, num_rows = rows
    curvature_R = tl.zeros(scales_R.shape, tl.float32)
    slope_R = tl.zeros(scales_R.shape, tl.float32)
    for start in range(0, S, Q):
        spread_QR = tl.zeros([Q, rows_R.shape[0]], tl.float32)
        for first in range(0, S, Q):
            centred_KR = _tile(levels, first, rows_R, num_rows, Q) - zeros_R[None, :]
            spread_QR = tl.dot(_gram_tile(gram, start, first, S, Q), centred_KR, spread_QR, input_precision="tf32x3")
        centred_QR = _tile(levels, start, rows_R, num_rows, Q) - zeros_R[None, :]
        curvature_R += tl.sum(spread_QR * centred_QR, 0)
        slope_R += tl.sum(_tile(gradient, start, rows_R, num_rows, Q) * centred_QR, 0)
        _store_tile(working, spread_QR, start, rows_R, num_rows)
    steps_R = tl.div_rn(slope_R, tl.where(curvature_R > 0, curvature_R, 1.0))
    change_R = storable_scales(scales_R - steps_R) - scales_R
    falls_R = (curvature_R > 0) & (2 * change_R * slope_R + change_R * change_R * curvature_R < 0)
    return tl.where(falls_R, change_R, 0.0)


@triton.jit
def _slopes(block, scale_change_R, rows, S: tl.constexpr, Q: tl.constexpr):
    """The error's change to first and second order where all weights move together."""
    _, gradient, gram, working = block
    rows_R, num_rows = rows
    slope_R = tl.zeros(scale_change_R.shape, tl.float32)
    curvature = 0.0
    for start in range(0, S, Q):
        slope_R += tl.sum(_tile(gradient, start, rows_R, num_rows, Q), 0)
        slope_R += scale_change_R * tl.sum(_tile(working, start, rows_R, num_rows, Q), 0)
        for first in range(0, S, Q):
            curvature += tl.sum(tl.sum(_gram_tile(gram, start, first, S, Q), 1), 0)
    return slope_R, curvature


@triton.jit
def _fit_zero_points(slope_R, curvature, scales_R, zeros_R, largest):
    """Each row's new zero point and what all its weights change by."""
    total_R = tl.zeros(scales_R.shape, tl.float32)
    for direction in tl.static_range(2):
        step = 1.0 - 2.0 * direction
        change_R = -step * scales_R
        gain_R = 2 * change_R * slope_R + change_R * change_R * curvature
        falls_R = (gain_R < 0) & (zeros_R + step >= 0) & (zeros_R + step <= largest)
        change_R = tl.where(falls_R, change_R, 0.0)
        zeros_R = tl.where(falls_R, zeros_R + step, zeros_R)
        slope_R += change_R * curvature
        total_R += change_R
    return zeros_R, total_R


@triton.jit
def _tile_gradient(block, changes, start, rows, S: tl.constexpr, MOVES: tl.constexpr, Q: tl.constexpr):
    """A tile's gradient, after all that has changed before it.

    In `working` there is H u where scales move, and in its earlier tiles are the changes that their levels have made.
    """
    _, gradient, gram, working = block
    scale_change_R, zero_change_R = changes
    rows_R, num_rows = rows
    gradient_QR = _tile(gradient, start, rows_R, num_rows, Q)
    if MOVES > 0:
        gradient_QR += scale_change_R[None, :] * _tile(working, start, rows_R, num_rows, Q)
    if MOVES > 1:
        spread_Q = tl.zeros([Q], tl.float32)
        for first in range(0, S, Q):
            spread_Q += tl.sum(_gram_tile(gram, start, first, S, Q), 1)
        gradient_QR += spread_Q[:, None] * zero_change_R[None, :]
    for first in range(0, start, Q):
        earlier_KR = _tile(working, first, rows_R, num_rows, Q)
        gradient_QR = tl.dot(_gram_tile(gram, start, first, S, Q), earlier_KR, gradient_QR, input_precision="tf32x3")
    return gradient_QR


@triton.jit
def _fit_parameters(
    block, state, rows, LARGEST: tl.constexpr, S: tl.constexpr, MOVES: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    """Each row's new scale and zero point, and what these changes add to scales and to all weights."""
    scales_R, zeros_R = state
    scale_change_R, zero_change_R = tl.zeros_like(scales_R), tl.zeros_like(scales_R)
    if MOVES > 0:
        scale_change_R = _fit_scales(block, state, rows, S, Q)
        tl.debug_barrier()  # what one thread wrote, another reads
        scales_R += scale_change_R
    if MOVES > 1:
        slope_R, curvature = _slopes(block, scale_change_R, rows, S, Q)
        zeros_R, zero_change_R = _fit_zero_points(slope_R, curvature, scales_R, zeros_R, LARGEST)
    return scales_R, zeros_R, scale_change_R, zero_change_R


# num_rows unspecialized: its divisors would let a thread load four rows of a column, and then compute all four.
@triton.jit(do_not_specialize=["num_rows"])
def _descend(
    levels, scales, zero_points, table, gradient, gram, working, changes, num_rows,
    S: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr, MOVES: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    rows, block = (rows_R, num_rows), (levels, gradient, gram, working)
    first_scales_R = tl.load(scales + rows_R, mask=inside_R, other=1.0)
    first_zeros_R = tl.load(zero_points + rows_R, mask=inside_R, other=0.0)
    scales_R, zeros_R, scale_change_R, zero_change_R = _fit_parameters(
        block, (first_scales_R, first_zeros_R), rows, LARGEST, S, MOVES, Q
    )
    divisors_R = tl.where(scales_R != 0, scales_R, float("inf"))
    for start in range(0, S, Q):
        gradient_QR = _tile_gradient(block, (scale_change_R, zero_change_R), start, rows, S, MOVES, Q)
        _store_tile(working, gradient_QR, start, rows_R, num_rows)
        tl.debug_barrier()
        # read at once and written at once: between single reads and writes a thread would wait for each
        gradient_QR, levels_QR = _tile(working, start, rows_R, num_rows, Q), _tile(levels, start, rows_R, num_rows, Q)
        changes_QR, moved_QR = tl.zeros([Q, R], tl.float32), tl.zeros([Q, R], tl.float32)
        for place in tl.static_range(Q):
            column, here_Q1 = start + place, tl.arange(0, Q)[:, None] == place
            gram_Q = tl.load(gram + (start + tl.arange(0, Q)) * S + column)
            before_R = tl.sum(tl.where(here_Q1, levels_QR, 0.0), 0)
            gradient_R = tl.sum(tl.where(here_Q1, gradient_QR, 0.0), 0) + tl.sum(gram_Q[:, None] * changes_QR, 0)
            step = tl.div_rn(1.0, tl.load(gram + column * S + column))
            wanted_R = before_R - tl.div_rn(gradient_R * step, divisors_R)
            _, after_R = nearest_level(wanted_R, table, LARGEST, KIND)
            change_R = (after_R - before_R) * scales_R
            moved_R = (after_R - zeros_R) * scales_R - (before_R - first_zeros_R) * first_scales_R
            changes_QR = tl.where(here_Q1, change_R[None, :], changes_QR)
            moved_QR = tl.where(here_Q1, moved_R[None, :], moved_QR)
            levels_QR = tl.where(here_Q1, after_R[None, :], levels_QR)
        _store_tile(levels, levels_QR, start, rows_R, num_rows)
        _store_tile(working, changes_QR, start, rows_R, num_rows)
        _store_tile(changes, moved_QR, start, rows_R, num_rows)
        tl.debug_barrier()
    tl.store(scales + rows_R, scales_R, mask=inside_R)
    tl.store(zero_points + rows_R, zeros_R, mask=inside_R)
