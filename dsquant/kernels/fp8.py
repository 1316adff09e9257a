"""Block-wise FP8 (DeepSeek's): a weight in float8_e4m3fn times one scale for each block of rows and columns.

Shape legend: O out features, I in features, J blocks along I.
"""

import torch

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
# Of float16's exponents and those of float8_e4m3fn, whose bias is 8 less.
SMALLER = 2.0**8
# Of float16: the sign and the seven bits that float8_e4m3fn has; these, all set, are no number there.
SIGN_AND_NUMBER, NO_NUMBER = -0x4080, 0x7F
# What a core's cache holds.
ROWS_AT_ONCE = 64


def dequantize_fp8(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiplies each block of a float8_e4m3fn weight [O, I] by its scale: [O, I], the same bits on every device.

    O counts from the first row of a block. Scales are [ceil(O / block rows), ceil(I / block columns)], float32 or
    float8_e8m0fnu; the last blocks may be ragged. The product is rounded to `dtype` once.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import fp8_triton

        return fp8_triton.dequantize_fp8(weight_OI, scales, block, dtype)
    return dequantize_fp8_reference(weight_OI, scales, block, dtype)


def dequantize_fp8_reference(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`dequantize_fp8` in PyTorch, on any device."""
    num_rows, num_columns = weight_OI.shape
    weight = torch.empty(weight_OI.shape, device=weight_OI.device)
    scales_per_column = scales.float() * SMALLER
    if block[1] < num_columns:
        scales_per_column = scales_per_column.repeat_interleave(block[1], dim=1)[:, :num_columns]
    for first in range(0, num_rows, ROWS_AT_ONCE):
        stop = min(first + ROWS_AT_ONCE, num_rows)
        block_rows = torch.arange(first, stop, device=weight.device) // block[0]
        within_one = first // block[0] == (stop - 1) // block[0]
        of_rows = scales_per_column[block_rows[:1] if within_one else block_rows]
        weight[first:stop].copy_(small_halves(weight_OI[first:stop])).mul_(of_rows)
    return weight.to(dtype)


def small_halves(codes: torch.Tensor) -> torch.Tensor:
    """Converts float8_e4m3fn to float16, over `SMALLER`, exactly: sign, exponent and mantissa have other places.

    PyTorch converts one number after the other on a CPU.
    """
    bytes_ = codes.view(torch.int8)
    halves = bytes_.to(torch.int16)
    torch.bitwise_left_shift(halves, 7, out=halves)  # of three bits of mantissa, to ten
    torch.bitwise_and(halves, SIGN_AND_NUMBER, out=halves)
    numbers = bytes_.bitwise_and(NO_NUMBER)
    if int(numbers.max()) == NO_NUMBER:
        return halves.view(torch.float16).masked_fill(numbers == NO_NUMBER, torch.nan)
    return halves.view(torch.float16)


def requantize_fp8(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a changed weight, float32 [O, I], to the blocks that it had: float8_e4m3fn [O, I] and float32 scales.

    A block's scale is multiplied by the smallest power of two that keeps its values in range. So a weight whose rows
    and columns were multiplied by powers of two keeps its codes' mantissas: it is exact but for values that become
    subnormal, below 2**-13 of the block's largest one.
    """
    codes, rescaled = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn), torch.empty_like(scales.float())
    for row, scales_J in enumerate(scales.float()):  # one block row at a time: no second tensor of the weight's size
        rows = slice(row * block[0], (row + 1) * block[0])
        scales_J = torch.where(scales_J > 0, scales_J, 1.0)
        largest_I = weight_OI[rows].abs().amax(0)
        largest_J = torch.stack([part.amax() for part in largest_I.split(block[1])])
        mantissas, exponents = torch.frexp(largest_J / (scales_J * LARGEST_FP8))
        rescaled[row] = torch.ldexp(scales_J, exponents - (mantissas == 0.5).int())
        per_column_I = rescaled[row].repeat_interleave(block[1])[: weight_OI.shape[1]]
        codes[rows] = (weight_OI[rows] / per_column_I).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes, rescaled
