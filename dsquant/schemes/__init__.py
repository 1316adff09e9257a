"""The numbers that weights may be rounded to; rounding, clip, compensation and descent work with any scheme."""

from dsquant.schemes.integers import CLIP_RATIOS, GROUP_SIZES, UNQUANTIZED, Grid, group_size_hint
from dsquant.schemes.quantized_weight import (
    QuantizedWeight,
    fake_quantize,
    joined,
    quantized,
    round_to_grid,
    round_to_nearest,
    stacked,
)
from dsquant.schemes.released_fp8 import FP8_WIDTH, Fp8Blocks
from dsquant.schemes.scheme import Scheme, fitted_together, widest_vectors

# The widths of linears that are not quantized.
KEPT_WIDTHS = (UNQUANTIZED, FP8_WIDTH)

__all__ = [
    "CLIP_RATIOS",
    "FP8_WIDTH",
    "GROUP_SIZES",
    "KEPT_WIDTHS",
    "UNQUANTIZED",
    "Fp8Blocks",
    "Grid",
    "QuantizedWeight",
    "Scheme",
    "fake_quantize",
    "fitted_together",
    "group_size_hint",
    "joined",
    "quantized",
    "round_to_grid",
    "round_to_nearest",
    "stacked",
    "widest_vectors",
]
