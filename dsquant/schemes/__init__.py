"""The numbers that weights may be rounded to; rounding, clip, compensation and descent work with any scheme."""

from dsquant.schemes.integers import CLIP_RATIOS, GROUP_SIZES, UNQUANTIZED, Grid, group_size_hint
from dsquant.schemes.scheme import Scheme
from dsquant.schemes.weights import (
    QuantizedWeight,
    fake_quantize,
    joined,
    quantized,
    round_to_grid,
    round_to_nearest,
    stacked,
)

__all__ = [
    "CLIP_RATIOS",
    "GROUP_SIZES",
    "UNQUANTIZED",
    "Grid",
    "QuantizedWeight",
    "Scheme",
    "fake_quantize",
    "group_size_hint",
    "joined",
    "quantized",
    "round_to_grid",
    "round_to_nearest",
    "stacked",
]
