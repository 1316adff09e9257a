"""The arguments and results of the hot loops, for the PyTorch reference of each and its Triton twin.

Shape legend: C candidates, O rows of a weight, I columns, B blocks of columns that share a scale, S columns of a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch

# The bits of a packed word.
WORD_BITS = 32
# Weights that share float16 factors in ggml's types.
SUPER_BLOCK = 256
# What float16 and bfloat16 both hold with bfloat16's full precision.
SMALLEST_SCALE = 2.0**-16
LARGEST_SCALE = 65280.0


class Kind(IntEnum):
    """The formula from a code to a weight; kernels are compiled for each."""

    INTEGERS = 0
    """scale * (code - zero_point)"""
    OFFSETS = 1
    """scale * code - offset"""
    TABLE = 2
    """scale * table[code]"""


@dataclass(frozen=True)
class Levels:
    """The values of a scheme's codes, in units of their block's scale."""

    largest: int
    """The largest code; the smallest is 0."""
    kind: Kind = Kind.INTEGERS
    symmetric: bool = True
    """Whether integers' zero points are all `middle`."""
    table: tuple[float, ...] = ()
    """The value of each code, ascending."""
    thresholds: tuple[float, ...] = ()
    """A value has as many of them below it as its code says; midpoints of the table, as the format breaks ties."""
    fixed: bool = False
    """Whether integers' scales stay as a search found them: a format stores them with few bits."""

    @property
    def middle(self) -> int:
        """The zero point of symmetric integers."""
        return (self.largest + 1) // 2

    @property
    def movable(self) -> bool:
        """Whether descent moves scales, and zero points that differ."""
        return self.kind == Kind.INTEGERS and not self.fixed


@cache
def table_on(device: torch.device, levels: Levels) -> torch.Tensor:
    """Copies the table and its thresholds to a device once: float32 [2 * largest + 1]; [0] without a table."""
    return numbers_on(device, (*levels.table, *levels.thresholds))


@cache
def numbers_on(device: torch.device, numbers: tuple[float, ...]) -> torch.Tensor:
    """Copies numbers to a device once: float32."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Parameters:
    """The scales and zero points of each block: tensors [O, B], or [C, O, B] of several candidates."""

    scales: torch.Tensor
    """float32: a block's scale as an engine computes it from what is stored."""
    zero_points: torch.Tensor
    """Whole numbers, uint8 or float32; of `Kind.OFFSETS` the offsets, float32. A table needs none: 0."""
    super_scales: tuple[torch.Tensor, ...] = ()
    """float32: what scales and offsets are whole multiples of, where a format stores those multiples."""

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Parameters":
        """Returns these with every tensor changed."""
        return Parameters(change(self.scales), change(self.zero_points), tuple(map(change, self.super_scales)))

    def chosen(self, candidates: torch.Tensor) -> "Parameters":
        """Returns one candidate's of each block: int64 [O, B], or [O, 1] for all blocks of a row."""
        return self.each(lambda part: part.gather(0, candidates.expand(1, *part.shape[1:]))[0])


def joined_blocks(parts: Sequence[Parameters]) -> Parameters:
    """Joins blocks of the same rows, one part's behind the other's."""
    supers = zip(*(part.super_scales for part in parts), strict=True)
    return Parameters(
        torch.cat([part.scales for part in parts], -1),
        torch.cat([part.zero_points for part in parts], -1),
        tuple(torch.cat(same, -1) for same in supers),
    )


@dataclass(frozen=True)
class CompensatedGroup:
    """A group's columns, rounded one after the other."""

    codes_SO: torch.Tensor
    """uint8."""
    errors_SO: torch.Tensor
    """float32: each column's error over its U_jj, what columns of later groups are changed by."""
    chosen_O: torch.Tensor
    """int64: the candidate whose parameters each row took."""


@dataclass(frozen=True)
class CompensatedBlocks:
    """Columns, rounded one after the other, with the parameters of their blocks."""

    codes_SO: torch.Tensor
    """uint8."""
    errors_SO: torch.Tensor
    """float32, as in `CompensatedGroup`."""
    parameters: Parameters
    """[O, B]; where `chosen_O` is given those of all candidates, [C, O, B]."""
    chosen_O: torch.Tensor | None = None
    """int64: the candidate whose parameters each row took."""


def parameters_of(parts: Sequence[CompensatedBlocks]) -> Parameters:
    """Returns the parameters of all blocks, [O, B]. What rows chose is taken for all parts at once, since a GPU would
    need a launch for each."""
    found = joined_blocks([part.parameters for part in parts])
    chosen = [part.chosen_O for part in parts if part.chosen_O is not None]
    if not chosen:
        return found
    num_blocks = found.scales.shape[-1] // len(chosen)
    return found.chosen(torch.stack(chosen, 1).repeat_interleave(num_blocks, 1))


@dataclass(frozen=True)
class DescendingBlock:
    """The levels, scales and zero points of one block while they move; all contiguous."""

    levels_SO: torch.Tensor
    """float32 [S, O]: codes, or a table's values, S = 16, 32, 64 or 128."""
    scales_O: torch.Tensor
    """float32 [O]."""
    zero_points_O: torch.Tensor
    """float32 [O], whole numbers in [0, largest]; 0 where there are offsets or a table."""
