"""`fp8` on a GPU, in one pass over memory.

Shape legend: O out features, I in features, R rows and C columns of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

ROWS = 16
COLUMNS = 256
WARPS = 4


def dequantize_fp8(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`fp8.dequantize_fp8` on the weight's GPU."""
    num_rows, num_columns = weight_OI.shape
    values_OI = torch.empty(num_rows, num_columns, dtype=dtype, device=weight_OI.device)
    programs = (triton.cdiv(num_columns, COLUMNS), triton.cdiv(num_rows, ROWS))
    tensors = (weight_OI.contiguous().view(torch.uint8), scales.float().contiguous(), values_OI)
    shape = (num_rows, num_columns, scales.shape[1], *block, ROWS, COLUMNS)
    _dequantize[programs](*tensors, *shape, num_warps=WARPS)
    return values_OI


@triton.jit
def _dequantize(
    weight, scales, values, num_rows, num_columns, row_scales,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    rows_R = tl.program_id(1) * R + tl.arange(0, R)
    columns_C = tl.program_id(0) * C + tl.arange(0, C)
    places_RC = rows_R.to(tl.int64)[:, None] * num_columns + columns_C[None, :]
    inside_RC = (rows_R < num_rows)[:, None] & (columns_C < num_columns)[None, :]
    bits_RC = tl.load(weight + places_RC, mask=inside_RC, other=0).to(tl.int32)
    # A float32 with these exponent and mantissa bits is the value times 2**-120, subnormal values too.
    magnitude_RC = ((bits_RC & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    magnitude_RC = tl.where((bits_RC & 0x7F) == 0x7F, float("nan"), magnitude_RC)
    value_RC = tl.where(bits_RC >= 0x80, -magnitude_RC, magnitude_RC)
    scales_RC = (rows_R // BLOCK_ROWS)[:, None] * row_scales + (columns_C // BLOCK_COLUMNS)[None, :]
    scales_RC = tl.load(scales + scales_RC, mask=inside_RC, other=0.0)
    tl.store(values + places_RC, (value_RC * scales_RC).to(values.dtype.element_ty), mask=inside_RC)
