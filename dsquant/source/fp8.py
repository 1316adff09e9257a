"""DeepSeek's block-wise FP8: a weight in float8_e4m3fn and one scale for each 128x128 block.

`w = fp8 * scale` with the block's scale; the tensor is called `weight_scale_inv`, yet it multiplies (DeepSeek-V3's
inference/fp8_cast_bf16.py). Blocks start at row and column 0, so the last ones are ragged where the extent is no
multiple of 128: R1's kv_a_proj_with_mqa has 576 rows and 5 rows of scales. The block size comes from the config, never
from dividing extents.
"""

import math

import torch

SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a weight: one for each begun block.

    Args:
        shape: the weight's shape [O, I].
        block: rows and columns of a block.

    Returns:
        [ceil(O / block rows), ceil(I / block columns)].
    """
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def dequantize_fp8(weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Multiplies each block by its scale.

    Args:
        weight_OI: float8_e4m3fn [O, I], O counted from the first row of a block.
        scales: [ceil(O / block rows), ceil(I / block columns)], float32 or float8_e8m0fnu (V3.1's ue8m0).
        block: rows and columns of a block.

    Returns:
        float32 [O, I].
    """
    num_rows, num_columns = weight_OI.shape
    weight = weight_OI.float()
    scales_per_column = scales.float().repeat_interleave(block[1], dim=1)[:, :num_columns]
    for block_row in range(scales.shape[0]):  # one block row at a time: no second tensor of the weight's size
        weight[block_row * block[0] : min((block_row + 1) * block[0], num_rows)] *= scales_per_column[block_row]
    return weight
