"""FP8 in blocks, as DeepSeek releases its models: E4M3 with one float32 scale for each block of rows and columns.

Weights are not rounded to it by a search: they have it already, and keep it where a format holds it.

Shape legend: O out features, I in features.
"""

import math
from dataclasses import dataclass

import torch

from dsquant.kernels.fp8 import requantize_fp8

# The width of a linear that keeps the source's blocks, where widths are chosen.
FP8_WIDTH = "FP8"


@dataclass(frozen=True)
class Fp8Blocks:
    """Blocks of a size. They start at row and column 0, so the last ones are ragged where the extent is not a multiple
    of theirs: R1's kv_a_proj_with_mqa has 576 rows and 5 rows of scales."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Returns the scales' shape for a weight [O, I], one for each block or part of one."""
        return math.ceil(shape[0] / self.rows), math.ceil(shape[1] / self.columns)

    def requantized(self, weight_OI: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rounds a weight, float32 [O, I], that has changed since it had these scales: codes float8_e4m3fn [O, I] and
        float32 scales; exact where rows and columns were multiplied by powers of two (`requantize_fp8`)."""
        return requantize_fp8(weight_OI, scales, (self.rows, self.columns))
