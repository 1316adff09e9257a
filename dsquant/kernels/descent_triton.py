"""`descent` on a GPU: a thread takes one row through all columns of the group.

The group is cut into blocks of columns, as in `compensation_triton`: what changes in earlier blocks do to a block's
gradient is one matrix product; inside a block changes stay in registers and a gradient is brought up to date as late as
it is read.

Shape legend: S columns of the group, O rows of the weight, R rows and Q columns of a program's block, K columns of an
earlier block.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import ROUNDER

# A warp with a row to each thread.
ROWS = 32
WARPS = 1
COLUMNS = 16


def descend_codes(
    codes_SO: torch.Tensor, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, scales_O: torch.Tensor, maximum_code: int
) -> torch.Tensor:
    """Moves a group's codes on their GPU.

    Args:
        codes_SO: as for `descent.descend_codes`; contiguous.
        gradient_SO: as for `descent.descend_codes`.
        gram_SS: as for `descent.descend_codes`.
        scales_O: as for `descent.descend_codes`.
        maximum_code: as for `descent.descend_codes`.

    Returns:
        As `descent.descend_codes`, up to the order of sums.
    """
    size, num_rows = codes_SO.shape
    changes_SO = torch.empty_like(codes_SO)
    inputs = (codes_SO, gradient_SO.contiguous(), gram_SS.contiguous(), scales_O.contiguous(), changes_SO)
    programs = (triton.cdiv(num_rows, ROWS),)
    _descend[programs](*inputs, num_rows, maximum_code, size, ROWS, COLUMNS, num_warps=WARPS, num_stages=1)
    return changes_SO


@triton.jit
def _block_gradient(gradient, gram, changes, start, rows_R, num_rows, S: tl.constexpr, Q: tl.constexpr):
    """Writes a block's gradient, after the changes of all columns before it, to where its own changes will be."""
    inside_1R = (rows_R < num_rows)[None, :]
    columns_Q = start + tl.arange(0, Q)
    offsets_QR = columns_Q[:, None] * num_rows + rows_R[None, :]
    gradient_QR = tl.load(gradient + offsets_QR, mask=inside_1R, other=0.0)
    for first in range(0, start, Q):
        before_K = first + tl.arange(0, Q)
        gram_QK = tl.load(gram + before_K[None, :] * S + columns_Q[:, None])
        changes_KR = tl.load(changes + before_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        gradient_QR = tl.dot(gram_QK, changes_KR, gradient_QR, input_precision="tf32x3")
    tl.store(changes + offsets_QR, gradient_QR, mask=inside_1R)


# num_rows unspecialized: its divisors would let a thread load four rows of a column, and then compute all four.
@triton.jit(do_not_specialize=["num_rows"])
def _descend(
    codes, gradient, gram, scales, changes, num_rows, maximum_code, S: tl.constexpr, R: tl.constexpr, Q: tl.constexpr
):
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    scales_R = tl.load(scales + rows_R, mask=inside_R, other=1.0)
    places_Q = tl.arange(0, Q)
    for start in range(0, S, Q):
        _block_gradient(gradient, gram, changes, start, rows_R, num_rows, S, Q)
        tl.debug_barrier()  # what one thread wrote, another reads
        changes_QR = tl.zeros([Q, R], tl.float32)
        for place in tl.static_range(Q):
            column = start + place
            gram_Q = tl.load(gram + (start + places_Q) * S + column)
            gradient_R = tl.load(changes + column * num_rows + rows_R, mask=inside_R, other=0.0)
            gradient_R += tl.sum(gram_Q[:, None] * changes_QR, 0)
            before_R = tl.load(codes + column * num_rows + rows_R, mask=inside_R, other=0.0)
            step = tl.div_rn(1.0, tl.load(gram + column * S + column))
            wanted_R = before_R - tl.div_rn(gradient_R * step, scales_R)
            after_R = (tl.minimum(tl.maximum(wanted_R, 0.0), maximum_code) + ROUNDER) - ROUNDER
            change_R = (after_R - before_R) * scales_R
            changes_QR = tl.where(places_Q[:, None] == place, change_R[None, :], changes_QR)
            tl.store(codes + column * num_rows + rows_R, after_R, mask=inside_R)
            tl.store(changes + column * num_rows + rows_R, change_R, mask=inside_R)
        tl.debug_barrier()
