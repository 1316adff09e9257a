"""`losses` on a GPU: half of the product, in three bfloat16 products for one in float32, never written to memory.

The Gram matrix is symmetric, so a tile of columns n needs only the columns k <= n before it, those off the diagonal
twice. Each tile's share of a row's loss is stored and the shares summed afterwards: the same bits in every run.

Shape legend: O out features, I in features, M rows, N and K columns of a tile.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.clipping_triton import OPERAND, split

ROWS = 128
COLUMNS = 128
DEPTH = 64
WARPS = 8
STAGES = 3
SPLIT_AT_ONCE: tl.constexpr = tl.constexpr(4096)
M: tl.constexpr = tl.constexpr(ROWS)
N: tl.constexpr = tl.constexpr(COLUMNS)
K: tl.constexpr = tl.constexpr(DEPTH)


def gram_losses(difference_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    """`losses.gram_losses` on the difference's GPU, within 2**-15 of the sum of the products' absolute values."""
    num_rows, num_columns = difference_OI.shape
    row_tiles, column_tiles = triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS)
    difference_OI, gram_II = difference_OI.contiguous(), gram_II.contiguous()
    shares = difference_OI.new_empty(column_tiles, num_rows)
    parts = (*_split_tensor(difference_OI), *_split_tensor(gram_II))
    tensors = (difference_OI, *parts, shares)
    _shares[row_tiles * column_tiles,](*tensors, num_rows, num_columns, num_warps=WARPS, num_stages=STAGES)
    return shares.sum(0).clamp_(min=0)


def _split_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32 if tl.float32 == OPERAND else torch.bfloat16
    high, low = torch.empty_like(values, dtype=dtype), torch.empty_like(values, dtype=dtype)
    programs = triton.cdiv(values.numel(), SPLIT_AT_ONCE.value)
    _split[programs,](values, high, low, values.numel(), OPERAND, num_warps=4)
    return high, low


@triton.jit
def _split(values, high, low, size, OPERAND: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * SPLIT_AT_ONCE + tl.arange(0, SPLIT_AT_ONCE)
    upper, rest = split(tl.load(values + places, mask=places < size, other=0.0), OPERAND)
    tl.store(high + places, upper, mask=places < size)
    tl.store(low + places, rest, mask=places < size)


@triton.jit
def _accumulate(sums_MN, operands, places, shape, depths):
    """Adds dW[:, start:stop] @ H[start:stop, columns]."""
    high, low, gram_high, gram_low = operands
    rows_M, columns_N = places
    num_rows, num_columns = shape
    start, stop = depths
    rows_M1 = rows_M.to(tl.int64)[:, None]
    for first in range(start, stop, K):
        depths_K = first + tl.arange(0, K)
        inside_K = depths_K < num_columns
        left_MK = rows_M1 * num_columns + depths_K[None, :]
        right_KN = depths_K.to(tl.int64)[:, None] * num_columns + columns_N[None, :]
        left_mask = (rows_M < num_rows)[:, None] & inside_K[None, :]
        right_mask = inside_K[:, None] & (columns_N < num_columns)[None, :]
        high_MK = tl.load(high + left_MK, mask=left_mask, other=0.0)
        low_MK = tl.load(low + left_MK, mask=left_mask, other=0.0)
        high_KN = tl.load(gram_high + right_KN, mask=right_mask, other=0.0)
        low_KN = tl.load(gram_low + right_KN, mask=right_mask, other=0.0)
        sums_MN = tl.dot(low_MK, high_KN, sums_MN, input_precision="ieee")
        sums_MN = tl.dot(high_MK, low_KN, sums_MN, input_precision="ieee")
        sums_MN = tl.dot(high_MK, high_KN, sums_MN, input_precision="ieee")
    return sums_MN


@triton.jit
def _shares(difference, high, low, gram_high, gram_low, shares, num_rows, num_columns):
    row_tiles = tl.cdiv(num_rows, M)
    # The last column tiles have the most work and start first.
    column_tile = tl.cdiv(num_columns, N) - 1 - tl.program_id(0) // row_tiles
    rows_M = (tl.program_id(0) % row_tiles) * M + tl.arange(0, M)
    columns_N = column_tile * N + tl.arange(0, N)
    start = column_tile * N
    sums_MN = tl.zeros([M, N], tl.float32)
    operands, places, shape = (high, low, gram_high, gram_low), (rows_M, columns_N), (num_rows, num_columns)
    sums_MN = _accumulate(sums_MN, operands, places, shape, (0, start))
    sums_MN = _accumulate(sums_MN * 2, operands, places, shape, (start, start + N))
    places_MN = rows_M.to(tl.int64)[:, None] * num_columns + columns_N[None, :]
    inside_MN = (rows_M < num_rows)[:, None] & (columns_N < num_columns)[None, :]
    difference_MN = tl.load(difference + places_MN, mask=inside_MN, other=0.0)
    share_M = tl.sum(sums_MN * difference_MN, 1)
    tl.store(shares + column_tile.to(tl.int64) * num_rows + rows_M, share_M, mask=rows_M < num_rows)
