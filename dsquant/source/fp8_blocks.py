"""DeepSeek's block-wise FP8: a weight in float8_e4m3fn and one scale for each 128x128 block.

`w = fp8 * scale` with the block's scale; the tensor is called `weight_scale_inv`, yet it multiplies (DeepSeek-V3's
inference/fp8_cast_bf16.py). Blocks start at row and column 0, so the last ones are ragged where the extent is not a
multiple of 128: R1's kv_a_proj_with_mqa has 576 rows and 5 rows of scales. The block size comes from the config, never
from dividing extents.
"""

SCALE_SUFFIX = "_scale_inv"
