"""`w4a16` on a GPU: codes are unpacked on their way into the matrix units, and scales applied to each group's product.

Codes minus zero points are small integers, exact in every 16-bit type; the scale of a group multiplies the float32
product of its columns. x in float32 is the sum of two bfloat16 parts, two products for one. Where few rows of x give
too few programs, the columns are shared out and the parts summed in a fixed order.

For many rows of a 16-bit x, unpacking for every tile of rows costs more than writing W out once, in x's type, for
PyTorch's product.

Shape legend: M rows of x, O out features, I in features, N and K columns and depth of a tile, W words.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from benchmarks.w4a16 import MIDDLE
from dsquant.kernels.clipping_triton import OPERAND, split

# Programs that keep an H100's or H200's 132 multiprocessors busy.
ENOUGH_PROGRAMS = 264
# From more rows of a 16-bit x on, W is written out.
FUSED_ROWS = 128
DEQUANTIZED_COLUMNS = 64


def matmul_awq(
    inputs_MI: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales_GO: torch.Tensor
) -> torch.Tensor:
    """Multiplies on the input's GPU.

    Args:
        inputs_MI: as for `w4a16.matmul_awq`.
        qweight: as for `w4a16.matmul_awq`.
        qzeros: as for `w4a16.matmul_awq`.
        scales_GO: as for `w4a16.matmul_awq`.

    Returns:
        As `w4a16.matmul_awq`.
    """
    group_size = len(qweight) // len(qzeros)
    tensors = (qweight.contiguous(), qzeros.contiguous(), scales_GO.contiguous())
    if len(inputs_MI) > FUSED_ROWS and inputs_MI.dtype != torch.float32:
        weight_IO = torch.empty(len(qweight), scales_GO.shape[1], dtype=inputs_MI.dtype, device=inputs_MI.device)
        return inputs_MI @ _dequantized(weight_IO, *tensors, group_size, True)
    return _matmul(inputs_MI, *tensors, group_size, True)


def matmul_pack_quantized(inputs_MI: torch.Tensor, packed: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Multiplies on the input's GPU.

    Args:
        inputs_MI: as for `w4a16.matmul_pack_quantized`.
        packed: as for `w4a16.matmul_pack_quantized`.
        scales_OG: as for `w4a16.matmul_pack_quantized`.

    Returns:
        As `w4a16.matmul_pack_quantized`.
    """
    group_size = packed.shape[1] * 8 // scales_OG.shape[1]
    tensors = (packed.contiguous(), packed, scales_OG.T.contiguous())
    if len(inputs_MI) > FUSED_ROWS and inputs_MI.dtype != torch.float32:
        weight_OI = torch.empty(len(packed), packed.shape[1] * 8, dtype=inputs_MI.dtype, device=inputs_MI.device)
        return inputs_MI @ _dequantized(weight_OI.T, *tensors, group_size, False)
    return _matmul(inputs_MI, *tensors, group_size, False)


def tiles(num_rows: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, warps, and pipeline stages, by the rows of x."""
    if num_rows <= 16:
        return 16, 64, 4, 4
    if num_rows <= 64:
        return 64, 64, 4, 3
    return 128, 128, 8, 3


def _matmul(
    inputs_MI: torch.Tensor,
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales_GO: torch.Tensor,
    group_size: int,
    awq: bool,
) -> torch.Tensor:
    inputs_MI = inputs_MI.contiguous()
    (num_rows, num_columns), out_features = inputs_MI.shape, scales_GO.shape[1]
    num_groups = num_columns // group_size
    rows, columns, warps, stages = tiles(num_rows)
    row_tiles, column_tiles = triton.cdiv(num_rows, rows), triton.cdiv(out_features, columns)
    parts = max(1, min(num_groups, ENOUGH_PROGRAMS // (row_tiles * column_tiles)))
    dtype = inputs_MI.dtype if parts == 1 else torch.float32
    products = torch.empty(parts, num_rows, out_features, dtype=dtype, device=inputs_MI.device)
    shape = (num_rows, out_features, num_columns, triton.cdiv(num_groups, parts), group_size, rows, columns)
    types = (awq, inputs_MI.dtype == torch.float32, OPERAND, MIDDLE)
    _product[row_tiles * column_tiles, parts](
        inputs_MI, words, zeros, scales_GO, products, *shape, *types, num_warps=warps, num_stages=stages
    )
    return products[0] if parts == 1 else products.sum(0).to(inputs_MI.dtype)


def _dequantized(
    weight_IO: torch.Tensor,
    words: torch.Tensor,
    zeros: torch.Tensor,
    scales_GO: torch.Tensor,
    group_size: int,
    awq: bool,
) -> torch.Tensor:
    num_columns, out_features = weight_IO.shape
    programs = (num_columns // group_size, triton.cdiv(out_features, DEQUANTIZED_COLUMNS))
    shape = (*weight_IO.stride(), out_features, num_columns, group_size, DEQUANTIZED_COLUMNS)
    _dequantize[programs](words, zeros, scales_GO, weight_IO, *shape, awq, MIDDLE, num_warps=4)
    return weight_IO


@triton.jit
def _awq_codes(words_KW, K: tl.constexpr, N: tl.constexpr):
    """The codes of AWQ words, [K, N]: eight columns of a word, the even ones in its lower half."""
    places = tl.arange(0, 8)
    shifts = (places // 2 + places % 2 * 4) * 4
    return tl.reshape((words_KW[:, :, None] >> shifts[None, None, :]) & 15, [K, N])


@triton.jit
def _centred_codes(
    words,
    zeros,
    group,
    tile,
    out_features,
    num_columns,
    K: tl.constexpr,
    N: tl.constexpr,
    AWQ: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    """Codes minus zero points of one group and one tile of columns, int32 [K, N]."""
    if AWQ:
        row_words = out_features // 8
        words_W = tile * (N // 8) + tl.arange(0, N // 8)
        inside_1W = (words_W < row_words)[None, :]
        depths_K = group * K + tl.arange(0, K)
        places_KW = depths_K.to(tl.int64)[:, None] * row_words + words_W[None, :]
        codes_KN = _awq_codes(tl.load(words + places_KW, mask=inside_1W, other=0), K, N)
        zeros_1W = tl.load(zeros + group * row_words + words_W[None, :], mask=inside_1W, other=0)
        codes_KN -= _awq_codes(zeros_1W, 1, N)
    else:
        columns_N = tile * N + tl.arange(0, N)
        words_D = group * (K // 8) + tl.arange(0, K // 8)
        places_ND = columns_N.to(tl.int64)[:, None] * (num_columns // 8) + words_D[None, :]
        words_ND = tl.load(words + places_ND, mask=(columns_N < out_features)[:, None], other=0)
        codes_NK = tl.reshape((words_ND[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15, [N, K])
        codes_KN = tl.trans(codes_NK) - MIDDLE
    return codes_KN


@triton.jit
def _dequantize(
    words,
    zeros,
    scales,
    weight,
    row_stride,
    column_stride,
    out_features,
    num_columns,
    K: tl.constexpr,
    N: tl.constexpr,
    AWQ: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    group, tile = tl.program_id(0), tl.program_id(1)
    codes_KN = _centred_codes(words, zeros, group, tile, out_features, num_columns, K, N, AWQ, MIDDLE)
    columns_N = tile * N + tl.arange(0, N)
    inside_N = columns_N < out_features
    scales_N = tl.load(scales + group * out_features + columns_N, mask=inside_N, other=0.0).to(tl.float32)
    depths_K = (group * K + tl.arange(0, K)).to(tl.int64)
    places_KN = depths_K[:, None] * row_stride + columns_N.to(tl.int64)[None, :] * column_stride
    values_KN = codes_KN.to(tl.float32) * scales_N[None, :]
    tl.store(weight + places_KN, values_KN.to(weight.dtype.element_ty), mask=inside_N[None, :])


@triton.jit
def _product(
    inputs,
    words,
    zeros,
    scales,
    products,
    num_rows,
    out_features,
    num_columns,
    groups_each,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    AWQ: tl.constexpr,
    FLOAT32: tl.constexpr,
    OPERAND: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, M)
    # Rows run fastest: programs side by side unpack the same words.
    rows_M = (tl.program_id(0) % row_tiles) * M + tl.arange(0, M)
    tile = tl.program_id(0) // row_tiles
    columns_N = tile * N + tl.arange(0, N)
    inside_M, inside_N = rows_M < num_rows, columns_N < out_features
    sums_MN = tl.zeros([M, N], tl.float32)
    num_groups = num_columns // K
    first = tl.program_id(1) * groups_each
    for group in range(first, tl.minimum(first + groups_each, num_groups)):
        depths_K = group * K + tl.arange(0, K)
        inputs_MK = tl.load(
            inputs + rows_M.to(tl.int64)[:, None] * num_columns + depths_K[None, :], mask=inside_M[:, None], other=0.0
        )
        codes_KN = _centred_codes(words, zeros, group, tile, out_features, num_columns, K, N, AWQ, MIDDLE)
        if FLOAT32:
            centred_KN = codes_KN.to(tl.float32).to(OPERAND)
            high_MK, low_MK = split(inputs_MK, OPERAND)
            product_MN = tl.dot(low_MK, centred_KN, input_precision="ieee")
            product_MN = tl.dot(high_MK, centred_KN, product_MN, input_precision="ieee")
        else:
            product_MN = tl.dot(inputs_MK, codes_KN.to(tl.float32).to(inputs_MK.dtype))
        scales_N = tl.load(scales + group * out_features + columns_N, mask=inside_N, other=0.0).to(tl.float32)
        sums_MN += product_MN * scales_N[None, :]
    places_MN = rows_M.to(tl.int64)[:, None] * out_features + columns_N[None, :]
    products += tl.program_id(1).to(tl.int64) * num_rows * out_features
    inside_MN = inside_M[:, None] & inside_N[None, :]
    tl.store(products + places_MN, sums_MN.to(products.dtype.element_ty), mask=inside_MN)
