"""The types of ggml whose codes stand for one weight each: K-quants, IQ4 and the older types of 32 weights.

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

from dsquant.kernels.scale_search import BlockShape, refitted_scales, stored_scales
from dsquant.kernels.values import Kind, Levels, Parameters
from dsquant.schemes.scheme import Scheme

SUPER_BLOCK = 256
OLDER_BLOCK = 32
BLOCKS = (16, OLDER_BLOCK, SUPER_BLOCK)
# Factors on what the search found, which has already weighed the range.
RATIOS = (1.0, 0.95, 0.9)
# Weights that are searched together on a CPU: what they need stays in a core's cache.
WEIGHTS_AT_ONCE = 2**17


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
        return OLDER_BLOCK if self.shape.scale_codes is None else SUPER_BLOCK

    @property
    def block_size(self) -> int:
        """The columns that share a scale."""
        return self.shape.size

    @property
    def units(self) -> tuple[int, ...]:
        """Those of all types: linears that read the same inputs share the order of their columns."""
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
        """Searches scales and offsets (`scale_search.stored_scales`); each ratio scales the float16 factors."""
        ones_I = torch.ones_like(weight_OI[0])
        importance_OI = (ones_I if importance_I is None else importance_I).expand_as(weight_OI)
        weight_SW, importance_SW = (part.reshape(-1, self.group_size) for part in (weight_OI, importance_OI))
        at_once = len(weight_SW) if weight_SW.is_cuda else WEIGHTS_AT_ONCE // self.group_size
        parts = [
            self._found(*part, clip_ratios)
            for part in zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True)
        ]
        shape = (len(clip_ratios), len(weight_OI), -1)
        scales, offsets, *supers = (torch.cat(same, 1).reshape(shape) for same in zip(*parts, strict=True))
        return Parameters(scales, offsets, tuple(supers))

    def _found(
        self, weight_SW: torch.Tensor, importance_SW: torch.Tensor, clip_ratios: Sequence[float]
    ) -> tuple[torch.Tensor, ...]:
        """Scales, zero points and super-scales, each [C, S, B]."""
        ratios_C11 = weight_SW.new_tensor(clip_ratios).view(-1, 1, 1)
        supers, products = [], []
        for factor_SB, codes_SB in stored_scales(weight_SW, importance_SW, self.shape).factors:
            super_CSB = (factor_SB.float() * ratios_C11).half().float().expand(-1, -1, codes_SB.shape[1])
            supers.append(super_CSB)
            products.append(super_CSB * codes_SB)
        if len(products) == 1:
            products.append(
                torch.full_like(products[0], self.levels.middle if self.levels.kind == Kind.INTEGERS else 0)
            )
        return (*products, *(supers if self.shape.scale_codes else ()))

    @property
    def searched(self) -> bool:
        """By columns' importance."""
        return True

    def refitted(
        self, block_OS: torch.Tensor, found: Parameters, clip_ratios: Sequence[float], importance_S: torch.Tensor
    ) -> Parameters:
        """Searches the block's scale and offset anew, in units of its super-block's factors; the last are the old."""
        weight_SO, (num_rows, size) = block_OS.T, block_OS.shape
        weights_SO = importance_S.unsqueeze(1).expand(size, num_rows)
        factors = [part[:, 0] for part in found.super_scales]
        scales_CO, *offsets = refitted_scales(weight_SO, weights_SO, factors, self.shape, clip_ratios)
        old_scales_1O, old_zeros_1O = found.scales.T, found.zero_points.T
        zeros_CO = offsets[0] if offsets else old_zeros_1O.expand_as(scales_CO)
        scales, zeros = (
            torch.cat(both).unsqueeze(2) for both in ((scales_CO, old_scales_1O), (zeros_CO, old_zeros_1O))
        )
        return Parameters(scales, zeros, tuple(part.expand(len(scales), -1, -1) for part in found.super_scales))


def _offsets(largest: int) -> Levels:
    return Levels(largest, Kind.OFFSETS)


def _integers(largest: int) -> Levels:
    return Levels(largest, fixed=True)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4 = Levels(
    15, Kind.TABLE, table=_IQ4_VALUES, thresholds=tuple((low + high) / 2 for low, high in pairwise(_IQ4_VALUES))
)

GGML_TYPES = {
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
"""Type -> the scheme that its codes are of."""
