"""ggml's super-blocks: 256 weights in blocks of 32 whose scales and offsets are 6 bits times a float16.

Reference: `block_q4_K` in ggml-common.h, https://github.com/ggml-org/ggml

Shape legend: C candidates, O out features, I in features, G super-blocks along I, B blocks along I.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels import k_quants
from dsquant.kernels.values import Kind, Levels, Parameters
from dsquant.schemes.quantized_weight import QuantizedWeight
from dsquant.schemes.scheme import Scheme

BLOCK = 32
BLOCKS = k_quants.SUPER_BLOCK // BLOCK
# Factors on both float16 numbers of a super-block; the search has already weighed its range.
RATIOS = (1.0, 0.98, 0.96, 0.94, 0.91, 0.88, 1.02, 1.04)


@dataclass(frozen=True)
class Q4K(Scheme):
    """Q4_K: weight = d * scale * code - dmin * offset, codes of 4 bits, scales and offsets of 6."""

    @property
    def group_size(self) -> int:
        return k_quants.SUPER_BLOCK

    @property
    def block_size(self) -> int:
        """The columns that share a scale and an offset."""
        return BLOCK

    @property
    def levels(self) -> Levels:
        return Levels(15, Kind.OFFSETS)

    @property
    def bits_per_weight(self) -> float:
        """144 bytes for 256 weights."""
        return 4.5

    @property
    def clip_ratios(self) -> tuple[float, ...]:
        """A little around what the search found."""
        return RATIOS

    def parameters(
        self, weight_OI: torch.Tensor, clip_ratios: Sequence[float] = (1.0,), importance_I: torch.Tensor | None = None
    ) -> Parameters:
        """Searches scales and offsets (`k_quants.affine_scales`); each ratio scales the two float16 factors."""
        ones_I = torch.ones_like(weight_OI[0])
        importance_OI = (ones_I if importance_I is None else importance_I).expand_as(weight_OI)
        weight_SW, importance_SW = (part.reshape(-1, k_quants.SUPER_BLOCK) for part in (weight_OI, importance_OI))
        found = k_quants.affine_scales(weight_SW, importance_SW, self.levels.largest)
        ratios_C11 = weight_OI.new_tensor(clip_ratios).view(-1, 1, 1)
        shape = (len(clip_ratios), len(weight_OI), -1)
        supers = [
            (factor_S1.float() * ratios_C11).half().float().expand(-1, -1, BLOCKS)
            for factor_S1 in (found.scale_S1, found.offset_S1)
        ]
        scales, offsets = (
            (super_CSB * codes_SB).reshape(shape)
            for super_CSB, codes_SB in zip(supers, (found.scale_codes_SB, found.offset_codes_SB), strict=True)
        )
        return Parameters(scales, offsets, tuple(super_CSB.reshape(shape) for super_CSB in supers))


def packed_q4_k(weight: QuantizedWeight) -> torch.Tensor:
    """Packs a weight of the scheme `Q4K`, [O, I], as ggml stores it: uint8 [O, I / 256 * 144]."""
    rows = len(weight.codes_OI)
    factors, codes = [], []
    pairs = zip(weight.super_scales_OG, (weight.scales_OG, weight.zero_points_OG), strict=True)
    for super_OB, product_OB in pairs:
        super_SB, product_SB = super_OB.reshape(-1, BLOCKS), product_OB.reshape(-1, BLOCKS)
        factors.append(super_SB[:, :1].half())
        codes.append((product_SB / torch.where(super_SB > 0, super_SB, torch.inf)).round())
    header_SN = k_quants.AffineScales(factors[0], codes[0], factors[1], codes[1]).header()
    codes_SN = k_quants.nibbles(weight.codes_OI.reshape(-1, BLOCKS, BLOCK))
    return torch.cat([header_SN, codes_SN], 1).view(rows, -1)
