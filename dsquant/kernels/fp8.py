"""Block-wise FP8 (DeepSeek's): a weight in float8_e4m3fn times one scale for each block of rows and columns.

Shape legend: O out features, I in features, J blocks along I.
"""

import torch

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


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
    weight = weight_OI.float()
    scales_per_column = scales.float()
    if block[1] < num_columns:
        scales_per_column = scales_per_column.repeat_interleave(block[1], dim=1)[:, :num_columns]
    if block[0] == 1:
        return weight.mul_(scales_per_column).to(dtype)
    for block_row in range(scales.shape[0]):  # one block row at a time: no second tensor of the weight's size
        weight[block_row * block[0] : min((block_row + 1) * block[0], num_rows)] *= scales_per_column[block_row]
    return weight.to(dtype)


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
