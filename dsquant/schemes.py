"""Rounding of weights to a group-wise integer grid.

Shape legend: O out features, I in features, G groups along I, S = group size (I = G * S).

The grid of one (row, group) is `w ≈ scale * (code - zero_point)` with `code` in [0, 2**bits - 1]. The
symmetric grid is the same with a constant zero point of 2**(bits - 1), as compressed-tensors defines it, so one
representation serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dsquant.kernels import grids
from dsquant.kernels.values import RoundedRows

# The width of a linear that is left in BF16, where widths are chosen.
UNQUANTIZED = 16
GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Grid:
    """How a weight is quantized: a hashable value that AWQ, writers and planning share."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    rounded: bool = True
    """False: scales are searched for this grid, but weights go on unrounded, to a format that rounds itself."""

    def with_bits(self, bits: int) -> "Grid":
        """The same grid with codes of other bits."""
        return replace(self, bits=bits)

    @property
    def maximum_code(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The constant zero point of the symmetric grid."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class QuantizedWeight:
    """The hand-over between quantization and the writers.

    `weight_OI ≈ scales_OG * (codes_OI - zero_points_OG)`, groups along I.
    """

    codes_OI: torch.Tensor
    """uint8 in [0, 2**bits - 1]."""
    scales_OG: torch.Tensor
    """float32 whose values float16 and bfloat16 both hold exactly."""
    zero_points_OG: torch.Tensor
    """uint8 in [0, 2**bits - 1]; constant 2**(bits - 1) where the grid is symmetric."""
    grid: Grid

    def dequantize(self) -> torch.Tensor:
        """Returns the weight that the codes stand for, float32 [O, I]."""
        return grids.dequantize_rows(self._rows, self.grid.group_size)

    def difference(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """How far the weight that the codes stand for is from another, float32 [O, I]."""
        return grids.dequantize_rows(self._rows, self.grid.group_size, weight_OI)

    def relative_error(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The distance from the weight that was rounded, over that weight's norm, float64 []; 0 for one of zeros."""
        norm = weight_OI.norm().double()
        return torch.where(norm > 0, self.difference(weight_OI).norm().double() / norm, 0.0)

    def split(self, num_rows: int | list[int]) -> list["QuantizedWeight"]:
        """Parts of so many rows each, as `torch.split` makes them."""
        parts = zip(*(part.split(num_rows) for part in self._tensors), strict=True)
        return [QuantizedWeight(codes_OI, scales_OG, zeros_OG, self.grid) for codes_OI, scales_OG, zeros_OG in parts]

    def or_else(self, other: "QuantizedWeight", keep_O: torch.Tensor) -> "QuantizedWeight":
        """These rows where `keep_O` (bool [O]) is true, and another's on the same grid elsewhere."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        codes_OI, scales_OG, zeros_OG = (torch.where(keep_O.unsqueeze(1), own, its) for own, its in pairs)
        return QuantizedWeight(codes_OI, scales_OG, zeros_OG, self.grid)

    @property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes_OI, self.scales_OG, self.zero_points_OG

    @property
    def _rows(self) -> RoundedRows:
        return RoundedRows(*self._tensors)


def group_size_hint(columns: int) -> str:
    """What a message says of the group sizes that divide a linear's columns."""
    fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
    return f"try --group-size {' or '.join(fitting)}" if fitting else "none of them divides these columns"


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of the rows of several, which share a grid and their number of columns."""
    codes_OI, scales_OG, zeros_OG = (torch.cat(same) for same in zip(*(part._tensors for part in parts), strict=True))
    return QuantizedWeight(codes_OI, scales_OG, zeros_OG, parts[0].grid)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of the columns of several, whole groups of the same rows."""
    if len(parts) == 1:
        return parts[0]
    codes_OI, scales_OG, zeros_OG = (
        torch.cat(same, dim=1) for same in zip(*(part._tensors for part in parts), strict=True)
    )
    return QuantizedWeight(codes_OI, scales_OG, zeros_OG, parts[0].grid)


def grid_parameters(
    weight_OI: torch.Tensor, grid: Grid, shrink_OG: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that span each group's range, times `shrink_OG`.

    Asymmetric: scale = (max - min) / (2**bits - 1), zero point = round(-min / scale), the range widened to hold 0
    (AutoAWQ's `pseudo_quantize_tensor`). Symmetric: scale = max|w| / ((2**bits - 1) / 2), zero point 2**(bits - 1)
    (compressed-tensors' `calculate_qparams`).

    Args:
        weight_OI: float32 [O, I].
        grid: the grid; I is a multiple of its group size.
        shrink_OG: factor in (0, 1] on each group's range, [O, G] or a number.

    Returns:
        scales float32 [O, G] and zero points float32 [O, G] holding integers.
    """
    return grids.grid_parameters(weight_OI, grid.group_size, grid.bits, grid.symmetric, shrink_OG)


def round_to_grid(
    weight_OI: torch.Tensor, grid: Grid, scales_OG: torch.Tensor, zero_points_OG: torch.Tensor
) -> QuantizedWeight:
    """Rounds each weight to the nearest point of the given grid.

    Args:
        weight_OI: float32 [O, I].
        grid: the grid.
        scales_OG: float32 [O, G].
        zero_points_OG: [O, G] holding integers.

    Returns:
        The quantized weight.
    """
    weight_OGS = weight_OI.unflatten(1, (-1, grid.group_size))
    codes_OGS = (weight_OGS / scales_OG.unsqueeze(-1)).round_().add_(zero_points_OG.unsqueeze(-1))
    codes_OI = codes_OGS.clamp_(0, grid.maximum_code).flatten(1).to(torch.uint8)
    return QuantizedWeight(codes_OI, scales_OG, zero_points_OG.to(torch.uint8), grid)


def fake_quantize(weight_OI: torch.Tensor, grid: Grid, shrink_OG: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Rounds to the nearest grid point and back: what a plainly quantized weight computes with.

    Args:
        weight_OI: float32 [O, I].
        grid: the grid.
        shrink_OG: factor on each group's range.

    Returns:
        float32 [O, I].
    """
    return round_to_nearest(weight_OI, grid, shrink_OG).dequantize()


def round_to_nearest(weight_OI: torch.Tensor, grid: Grid, shrink_OG: torch.Tensor | float = 1.0) -> QuantizedWeight:
    """Plain rounding: the grid spans each group's (shrunk) range and every weight goes to the nearest point.

    Args:
        weight_OI: float32 [O, I].
        grid: the grid.
        shrink_OG: factor on each group's range.

    Returns:
        The quantized weight.
    """
    rounded = grids.round_rows(weight_OI, grid.group_size, grid.bits, grid.symmetric, shrink_OG)
    return QuantizedWeight(rounded.codes_OI, rounded.scales_OG, rounded.zero_points_OG, grid)
