"""What the hot loops take and give, for the PyTorch reference of each and its Triton twin.

Shape legend: O rows of a weight, I columns, G groups along I, S columns of one group.
"""

from dataclasses import dataclass

import torch

# The bits of a packed word.
WORD_BITS = 32
# What float16 and bfloat16 both hold with bfloat16's full precision.
SMALLEST_SCALE = 2.0**-16
LARGEST_SCALE = 65280.0


@dataclass(frozen=True)
class RoundedRows:
    """A weight on its grid: `weight ≈ scales * (codes - zero_points)`."""

    codes_OI: torch.Tensor
    """uint8 in [0, 2**bits - 1]."""
    scales_OG: torch.Tensor
    """float32 whose values float16 and bfloat16 both hold exactly."""
    zero_points_OG: torch.Tensor
    """uint8 in [0, 2**bits - 1]."""


@dataclass(frozen=True)
class CompensatedGroup:
    """A group's columns, rounded one after the other."""

    codes_SO: torch.Tensor
    """uint8 in [0, 2**bits - 1]."""
    errors_SO: torch.Tensor
    """float32: each column's error over its U_jj, what columns of later groups are changed by."""
    scales_O: torch.Tensor
    """float32."""
    zero_points_O: torch.Tensor
    """uint8 in [0, 2**bits - 1]."""


@dataclass(frozen=True)
class DescendingGroup:
    """The codes, scales and zero points of one group while they move; all contiguous."""

    codes_SO: torch.Tensor
    """float32 [S, O], whole numbers in [0, maximum_code], S = 32, 64 or 128."""
    scales_O: torch.Tensor
    """float32 [O], positive and storable."""
    zero_points_O: torch.Tensor
    """float32 [O], whole numbers in [0, maximum_code]."""
