"""Weights that their makers trained and released in 4 bits (Kimi-K2-Thinking, K2.5), as blocks of Q4_0: the same codes.

Both have groups of 32 with one scale and codes around 8. The releases use -7 to 7 alone, and ggml's own rounding, which
takes a group's largest weight for -8, would find other scales. A scale is BF16 there and F16 here: the same number from
2^-14 to 2^16, rounded below; the record tells what that changed.

Shape legend: O out features, I in features, G groups along I.
"""

import torch

from dsquant.kernels.packing import unpack_rows
from dsquant.kernels.values import WORD_BITS
from dsquant.schemes import QuantizedWeight
from dsquant.schemes.ggml_types import BLOCK_TYPES
from dsquant.source.checkpoint import PACKED_SUFFIX, Checkpoint

Q4_0 = BLOCK_TYPES["Q4_0"]
BITS = 4


def released_codes(checkpoint: Checkpoint, parameter: str) -> QuantizedWeight | None:
    """Reads the codes and scales of a packed weight; None where it is not packed, or not in symmetric groups of 32."""
    index = checkpoint.index
    packed, scales = (index.get(parameter + suffix) for suffix in (PACKED_SUFFIX, "_scale"))
    if packed is None or scales is None or parameter + "_zero_point" in index:
        return None
    (rows, words), groups = packed.shape, scales.shape[1]
    if words * WORD_BITS != groups * Q4_0.group_size * BITS:
        return None
    codes_OI = unpack_rows(index.read(packed.name), words * WORD_BITS // BITS, BITS)
    scales_OG = index.read(scales.name).float()
    middle_OG = torch.full((rows, groups), Q4_0.levels.middle, dtype=torch.uint8)
    return QuantizedWeight(codes_OI, scales_OG, middle_OG, Q4_0)
