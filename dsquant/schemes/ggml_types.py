"""The types of ggml: K-quants, IQ4 and the older types of 32 weights, whose codes stand for one weight each, and code
books.

A super-block of 256 weights has float16 factors; the scales and offsets of its blocks of 16 or 32 are whole numbers of
4 to 8 bits times these. Older types have blocks of 32 with float16 numbers of their own. Each type is a row of
`GGML_TYPES`; `formats.gguf.block_bytes` makes ggml's bytes of the result.

Reference: the structs in ggml-common.h, https://github.com/ggml-org/ggml

Shape legend: C candidates, O out features, I in features, S super-blocks, W weights of one, B blocks along I.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from dsquant.kernels.code_books import TYPES
from dsquant.kernels.scale_search import BlockShape
from dsquant.kernels.super_blocks import block_parameters, compensate_blocks
from dsquant.kernels.values import SUPER_BLOCK, CompensatedBlocks, Kind, Levels, Parameters
from dsquant.schemes.code_book_types import BLOCKS, CodeBook
from dsquant.schemes.scheme import Scheme

# Factors on what the search found, which has already weighed the range.
RATIOS = (1.0, 0.95, 0.9)


@dataclass(frozen=True)
class GgmlType(Scheme):
    """A type of ggml, by data."""

    name: str
    num_bytes: int
    """Of a group."""
    shape: BlockShape

    @property
    def group_size(self) -> int:
        """A super-block; of the older types a block."""
        return self.shape.group_size

    @property
    def block_size(self) -> int:
        """The columns that share a scale."""
        return self.shape.size

    @property
    def units(self) -> tuple[int, ...]:
        return BLOCKS

    @property
    def levels(self) -> Levels:
        return self.shape.levels

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.group_size

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """A little less than what the search found."""
        return RATIOS

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Searches scales and offsets (`kernels.scale_search`); each ratio scales the float16 factors."""
        ones_I = torch.ones_like(weight_OI[0])
        importance_OI = (ones_I if importance_I is None else importance_I).expand_as(weight_OI)
        return block_parameters(weight_OI, importance_OI, self.shape, clip_ratios)

    @property
    def searched(self) -> bool:
        """By columns' importance."""
        return True

    @property
    def columns_at_once(self) -> int:
        """A super-block, of all types."""
        return SUPER_BLOCK

    def compensated(
        self, weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, clip_ratios: Sequence[float]
    ) -> CompensatedBlocks:
        """Searches a block's parameters again once the columns before it are rounded."""
        return compensate_blocks(weight_SO, factor_SS, importance_S, self.shape, clip_ratios)


def _offsets(largest: int) -> Levels:
    return Levels(largest, Kind.OFFSETS)


def _integers(largest: int) -> Levels:
    return Levels(largest, fixed=True)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4 = Levels(
    15, Kind.TABLE, table=_IQ4_VALUES, thresholds=tuple((low + high) / 2 for low, high in pairwise(_IQ4_VALUES))
)

BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        GgmlType("Q2_K", 84, BlockShape(_offsets(3), 16, (0, 15))),
        GgmlType("Q3_K", 110, BlockShape(_integers(7), 16, (-32, 31))),
        GgmlType("Q4_K", 144, BlockShape(_offsets(15), 32, (0, 63))),
        GgmlType("Q5_K", 176, BlockShape(_offsets(31), 32, (0, 63))),
        GgmlType("Q6_K", 210, BlockShape(_integers(63), 16, (-128, 127))),
        GgmlType("IQ4_XS", 136, BlockShape(_IQ4, 32, (-32, 31))),
        GgmlType("IQ4_NL", 18, BlockShape(_IQ4, 32, None)),
        GgmlType("Q4_0", 18, BlockShape(_integers(15), 32, None)),
        GgmlType("Q4_1", 20, BlockShape(_offsets(15), 32, None)),
        GgmlType("Q5_0", 22, BlockShape(_integers(31), 32, None)),
        GgmlType("Q5_1", 24, BlockShape(_offsets(31), 32, None)),
        # from -127 to 127, as ggml's own
        GgmlType("Q8_0", 34, BlockShape(_integers(254), 32, None)),
    )
}
"""Type -> the scheme that its codes are of, each of one weight."""
GGML_TYPES: dict[str, GgmlType | CodeBook] = BLOCK_TYPES | {name: CodeBook(name) for name in TYPES}
"""Type -> the scheme that its codes are of."""
