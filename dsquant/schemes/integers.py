"""Integers in groups with a scale and a zero point.

`weight ≈ scale * (code - zero_point)` with codes of 2 to 8 bits. The symmetric grid is the same with a constant zero
point of 2**(bits - 1), as compressed-tensors defines it, so one representation serves both.

Shape legend: C candidates, O out features, I in features, B groups along I.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from dsquant.kernels import grids
from dsquant.kernels.values import Levels, Parameters
from dsquant.schemes.scheme import Scheme

# The width of a linear that is left in BF16, where widths are chosen.
UNQUANTIZED = 16
GROUP_SIZES = (128, 64, 32)
SCALE_BITS = 16
# AutoAWQ goes down to 0.55 in steps of 0.05; less than 0.65 was never chosen, so the same number of steps is finer.
CLIP_RATIOS = tuple(1 - step / 25 for step in range(10))
# Up to so many bits a symmetric scale's sign is tried both ways: of few levels, the one more on one side counts more.
BITS_OF_BOTH_SIGNS = 3


@dataclass(frozen=True)
class Grid(Scheme):
    """Integers in groups: a hashable value that AWQ, writers and planning share."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    rounded: bool = True
    """False: scales are searched for this grid, but linears without a scheme of their own go on unrounded, to a format
    that rounds itself and weighs columns by their importance."""
    output: str = ""
    """Keeps apart outputs on one grid that quantize other linears, or to other widths."""

    def with_bits(self, bits: int) -> Self:
        return replace(self, bits=bits)

    @property
    def maximum_code(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The constant zero point of the symmetric grid."""
        return self.levels.middle

    @property
    def levels(self) -> Levels:
        return Levels(self.maximum_code, symmetric=self.symmetric)

    @property
    def facts(self) -> Mapping[str, Any]:
        """All but what keeps outputs apart."""
        return {name: value for name, value in vars(self).items() if name != "output"}

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales, and zero points where they differ."""
        return self.bits + (SCALE_BITS + (0 if self.symmetric else self.bits)) / self.group_size

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """From the whole range down to 0.64 of it; in symmetric groups of few bits again with the other sign."""
        if self.symmetric and self.bits <= BITS_OF_BOTH_SIGNS:
            return (*CLIP_RATIOS, *(-ratio for ratio in CLIP_RATIOS))
        return CLIP_RATIOS

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Spans each group's range times each ratio (`grids.range_parameters`)."""
        del importance_I
        return grids.range_parameters(weight_OI, self.group_size, self.levels, clip_ratios)

    def round_plainly(
        self, weight_OI: torch.Tensor, importance_I: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Parameters]:
        """In one pass on a GPU; a range weighs no columns."""
        del importance_I
        return grids.round_to_range(weight_OI, self.group_size, self.levels)

    def scaled_differences(self, weight_OI: torch.Tensor, column_scales_CI: torch.Tensor) -> torch.Tensor:
        """In one pass on a GPU."""
        return grids.fake_quantize_difference(weight_OI, column_scales_CI, self.group_size, self.levels)


def group_size_hint(columns: int) -> str:
    """Returns a message's advice on the group sizes that divide a linear's columns."""
    fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
    return f"try --group-size {' or '.join([*fitting, 'auto'])}"
