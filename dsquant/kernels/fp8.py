"""Block-wise FP8 (DeepSeek's): a weight in float8_e4m3fn times one scale for each block of rows and columns.

Shape legend: O out features, I in features.
"""

import torch


def dequantize_fp8(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiplies each block by its scale.

    Args:
        weight_OI: float8_e4m3fn [O, I], O counted from the first row of a block.
        scales: [ceil(O / block rows), ceil(I / block columns)], float32 or float8_e8m0fnu.
        block: rows and columns of a block; the last ones may be ragged.
        dtype: of the result; the product is rounded to it once.

    Returns:
        [O, I], the same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import fp8_triton

        return fp8_triton.dequantize_fp8(weight_OI, scales, block, dtype)
    return dequantize_fp8_reference(weight_OI, scales, block, dtype)


def dequantize_fp8_reference(
    weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`dequantize_fp8` in PyTorch, on any device.

    Args:
        weight_OI: as for `dequantize_fp8`.
        scales: as for `dequantize_fp8`.
        block: as for `dequantize_fp8`.
        dtype: as for `dequantize_fp8`.

    Returns:
        As `dequantize_fp8`.
    """
    num_rows, num_columns = weight_OI.shape
    weight = weight_OI.float()
    scales_per_column = scales.float().repeat_interleave(block[1], dim=1)[:, :num_columns]
    for block_row in range(scales.shape[0]):  # one block row at a time: no second tensor of the weight's size
        weight[block_row * block[0] : min((block_row + 1) * block[0], num_rows)] *= scales_per_column[block_row]
    return weight.to(dtype)
