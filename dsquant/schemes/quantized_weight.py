"""Weights rounded to a scheme.

Shape legend: O out features, I in features, G blocks along I that share a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels import grids
from dsquant.kernels.values import Kind, Parameters
from dsquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class QuantizedWeight:
    """The hand-over between quantization and the writers.

    Of integers `weight_OI ≈ scales_OG * (codes_OI - zero_points_OG)`; `grid.levels` says what other codes stand for.
    """

    codes_OI: torch.Tensor
    """uint8 in [0, largest code]."""
    scales_OG: torch.Tensor
    """float32; of integers values that float16 and bfloat16 both hold exactly."""
    zero_points_OG: torch.Tensor
    """uint8 in [0, largest code]; offsets, float32, where levels have them."""
    grid: Scheme
    super_scales_OG: tuple[torch.Tensor, ...] = ()
    """float32: what scales and offsets are whole multiples of, where a format stores those multiples."""

    @property
    def parameters(self) -> Parameters:
        """All but the codes."""
        return Parameters(self.scales_OG, self.zero_points_OG, self.super_scales_OG)

    def dequantize(self) -> torch.Tensor:
        """Returns the weight that the codes stand for, float32 [O, I]."""
        return grids.dequantize_rows(self.codes_OI, self.parameters, self.grid.levels)

    def difference(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns how far the weight that the codes stand for is from another, float32 [O, I]."""
        return grids.dequantize_rows(self.codes_OI, self.parameters, self.grid.levels, weight_OI)

    def relative_error(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Returns the distance from the weight before rounding, over its norm, float64 []; 0 for one of zeros."""
        norm = weight_OI.norm().double()
        return torch.where(norm > 0, self.difference(weight_OI).norm().double() / norm, 0.0)

    def split(self, num_rows: int | list[int]) -> list["QuantizedWeight"]:
        """Returns parts of so many rows each, as `torch.split` does."""
        parts = zip(*(part.split(num_rows) for part in self._tensors), strict=True)
        return [_of_tensors(tensors, self.grid) for tensors in parts]

    def rows(self, rows_R: torch.Tensor) -> "QuantizedWeight":
        """Returns these rows, int64 [R], in this order."""
        return _of_tensors([part[rows_R] for part in self._tensors], self.grid)

    def or_else(self, other: "QuantizedWeight", keep_O: torch.Tensor) -> "QuantizedWeight":
        """Takes these rows where `keep_O` (bool [O]) is true, and those of another of the same scheme elsewhere."""
        pairs = zip(self._tensors, other._tensors, strict=True)
        return _of_tensors([torch.where(keep_O.unsqueeze(1), own, its) for own, its in pairs], self.grid)

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes_OI, self.scales_OG, self.zero_points_OG, *self.super_scales_OG


def _of_tensors(tensors: Sequence[torch.Tensor], grid: Scheme) -> QuantizedWeight:
    codes_OI, scales_OG, zeros_OG, *super_scales = tensors
    return QuantizedWeight(codes_OI, scales_OG, zeros_OG, grid, tuple(super_scales))


def quantized(codes_OI: torch.Tensor, parameters: Parameters, scheme: Scheme) -> QuantizedWeight:
    """Makes a weight of codes and parameters [O, G], zero points in the type that writers take."""
    zeros_OG = parameters.zero_points
    zeros_OG = zeros_OG if scheme.levels.kind == Kind.OFFSETS else zeros_OG.to(torch.uint8)
    return QuantizedWeight(codes_OI, parameters.scales, zeros_OG, scheme, parameters.super_scales)


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Joins the rows of several weights, which share a scheme and their number of columns."""
    return _together(parts, torch.cat)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Joins the columns of several weights, whole groups of the same rows."""
    return parts[0] if len(parts) == 1 else _together(parts, lambda same: torch.cat(same, dim=1))


def _together(
    parts: Sequence[QuantizedWeight], join: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
) -> QuantizedWeight:
    return _of_tensors([join(same) for same in zip(*(part._tensors for part in parts), strict=True)], parts[0].grid)


def round_to_grid(
    weight_OI: torch.Tensor, grid: Scheme, scales_OG: torch.Tensor, zero_points_OG: torch.Tensor
) -> QuantizedWeight:
    """Rounds each weight [O, I] to the nearest level of given scales and whole-numbered zero points [O, G]."""
    parameters = Parameters(scales_OG, zero_points_OG)
    return quantized(grids.round_rows(weight_OI, parameters, grid.levels), parameters, grid)


def round_to_nearest(weight_OI: torch.Tensor, grid: Scheme) -> QuantizedWeight:
    """Rounds plainly: parameters span each group's range, or are searched, and weights go to the nearest level."""
    grid = grid.fitted(weight_OI)
    return quantized(*grid.round_plainly(weight_OI), grid)


def fake_quantize(weight_OI: torch.Tensor, grid: Scheme) -> torch.Tensor:
    """Rounds plainly and back: what a plainly quantized weight computes with, float32 [O, I]."""
    return round_to_nearest(weight_OI, grid).dequantize()
