"""Searches for the scales of ggml's blocks, each by the weighted squared error that it leaves.

Some thirty candidates for each block, the best one by weighted least squares; then scales of 4 to 8 bits, and offsets,
for each super-block. A candidate's error follows from three sums over its codes, in units of the block's range and
around its mean, so no second pass over the weights is needed and nothing cancels. Two things differ from ggml's
searches and leave less error: stored scales are judged as float16 will hold their factor, and offsets are fitted to the
scales as they are stored.
Reference: `make_qkx3_quants`, `make_qp_quants`, `make_qx_quants` and `quantize_row_iq4_nl_impl` in ggml-quants.c,
https://github.com/ggml-org/ggml

Shape legend: S super-blocks, B blocks of a super-block, W weights of a block, N = S * B blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsquant.kernels.grids import nearest_levels
from dsquant.kernels.scale_candidates import (
    AFFINE_FIRST,
    AFFINE_STEP,
    AFFINE_TRIES,
    BETTER,
    LARGEST_SCALE,
    LEAST,
    SCALE_FIRST,
    SCALE_STEP,
    SCALE_TRIES,
    symmetric_candidates,
)
from dsquant.kernels.values import SUPER_BLOCK, Kind, Levels

LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class BlockShape:
    """How a type of ggml stores the parameters of its blocks."""

    levels: Levels
    """With offsets, a block has a scale and an offset; else a scale that may be negative."""
    size: int
    """Weights of a block."""
    scale_codes: tuple[int, int] | None
    """The least and the largest of the whole numbers that are scales in units of the super-block's factor, and offsets
    in those of another; None where a block's scale is a float16 of its own."""

    @property
    def group_size(self) -> int:
        """Weights that are stored together: a super-block, or a block with scales of its own."""
        return SUPER_BLOCK if self.scale_codes else self.size

    @property
    def zero_point(self) -> int:
        """Of levels that have no offsets."""
        return self.levels.middle if self.levels.kind == Kind.INTEGERS else 0


@dataclass(frozen=True)
class StoredScales:
    """The stored parameters of super-blocks: each scale or offset is a factor times a whole number."""

    scale_S1: torch.Tensor
    """float16 [S, 1]."""
    scale_codes_SB: torch.Tensor
    """Whole numbers, float32 [S, B]; 1 where the factor is the scale."""
    offset_S1: torch.Tensor | None = None
    offset_codes_SB: torch.Tensor | None = None

    @property
    def factors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of scales, then of offsets where there are any: factors and their whole numbers."""
        yield self.scale_S1, self.scale_codes_SB
        if self.offset_S1 is not None and self.offset_codes_SB is not None:
            yield self.offset_S1, self.offset_codes_SB


def stored_scales(weight_SW: torch.Tensor, importance_SW: torch.Tensor, shape: BlockShape) -> StoredScales:
    """Searches the scales of super-blocks, float32 [S, weights of a super-block], as they are stored.

    `importance_SW`, positive, weighs each squared error.
    """
    blocks = (-1, shape.size)
    weight_WN, weights_WN = (blocks_last(part.unflatten(1, blocks)) for part in (weight_SW, importance_SW))
    shares_SB = importance_SW.unflatten(1, blocks).sum(2)
    if shape.levels.kind == Kind.OFFSETS:
        found = affine_search(weight_WN, weights_WN, shape.levels.largest, signed=shape.scale_codes is None)
        scale_SB, code_SB, mean_SB = (values_N.view_as(shares_SB) for values_N in found)
        return _stored_lines(scale_SB, code_SB, mean_SB, shares_SB, shape)
    scale_SB = symmetric_search(weight_WN, weights_WN, shape.levels).view_as(shares_SB)
    if shape.scale_codes is None:
        return StoredScales(_half(scale_SB), torch.ones_like(scale_SB))
    return StoredScales(*scale_search(scale_SB, shares_SB, shape.scale_codes))


def _stored_lines(
    scale_SB: torch.Tensor, code_SB: torch.Tensor, mean_SB: torch.Tensor, shares_SB: torch.Tensor, shape: BlockShape
) -> StoredScales:
    """Stores scales, and the offsets that fit them as they are stored."""
    if shape.scale_codes is None:
        stored_SB = _half(scale_SB)
        ones_SB = torch.ones_like(scale_SB)
        return StoredScales(stored_SB, ones_SB, _half(stored_SB.float() * code_SB - mean_SB), ones_SB)
    scale_S1, scale_codes_SB = scale_search(scale_SB, shares_SB, shape.scale_codes)
    # Where the line would start above zero it starts at zero.
    offsets_SB = (scale_S1.float() * scale_codes_SB * code_SB - mean_SB).clamp_(min=0)
    return StoredScales(scale_S1, scale_codes_SB, *scale_search(offsets_SB, shares_SB, shape.scale_codes))


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).half()


def blocks_last(values_SBW: torch.Tensor) -> torch.Tensor:
    """Returns [W, N]: sums over a block are then sums of vectors, several times as fast on a CPU."""
    return values_SBW.flatten(0, 1).T.contiguous()


def affine_search(
    weight_WN: torch.Tensor, weights_WN: torch.Tensor, steps: int, signed: bool = False
) -> tuple[torch.Tensor, ...]:
    """Returns each block's scale, so that scale * code - offset has the least weighted squared error, its mean code and
    its mean; offsets are not negative unless `signed`."""
    if weight_WN.is_cuda:
        from dsquant.kernels import scale_search_triton

        return scale_search_triton.affine_search(weight_WN, weights_WN, steps, signed)
    return affine_search_reference(weight_WN, weights_WN, steps, signed)


def affine_search_reference(
    weight_WN: torch.Tensor, weights_WN: torch.Tensor, steps: int, signed: bool
) -> tuple[torch.Tensor, ...]:
    """`affine_search` in PyTorch, on any device."""
    low_N = weight_WN.amin(0)
    if not signed:
        low_N.clamp_(max=0)
    range_N = weight_WN.amax(0) - low_N
    safe_range_N = range_N.clamp(min=LEAST)
    unit_WN = (weight_WN - low_N) / safe_range_N
    weights_WN = weights_WN / weights_WN.sum(0).clamp_(min=LEAST)
    mean_N = (weights_WN * unit_WN).sum(0)
    centred_WN = unit_WN - mean_N
    # A line that would start above zero starts at zero: offsets are not negative.
    above_N = torch.full_like(mean_N, -1e9) if signed else (mean_N + low_N / safe_range_N).clamp_(min=0)
    best_N, slope_N, best_code_N = (
        torch.zeros_like(mean_N),
        torch.full_like(mean_N, 1 / steps),
        torch.zeros_like(mean_N),
    )
    codes_WN, weighted_WN = torch.empty_like(unit_WN), torch.empty_like(unit_WN)
    for number in range(AFFINE_TRIES):
        torch.mul(unit_WN, steps + AFFINE_FIRST + AFFINE_STEP * number, out=codes_WN).round_().clamp_(max=steps)
        torch.mul(weights_WN, codes_WN, out=weighted_WN)
        code_N = weighted_WN.sum(0)
        square_N = codes_WN.mul_(weighted_WN).sum(0).clamp_(min=LEAST)
        product_N = weighted_WN.mul_(centred_WN).sum(0)
        slope = product_N / (square_N - code_N.square()).clamp_(min=LEAST)
        fixed = slope * code_N < above_N
        product_N = torch.where(fixed, product_N + above_N * code_N, product_N)
        slope = torch.where(fixed, product_N / square_N, slope)
        gain_N = torch.where(fixed, slope * product_N - above_N.square(), slope * product_N)
        better = gain_N > best_N
        for kept, found in ((best_N, gain_N), (slope_N, slope), (best_code_N, code_N)):
            torch.where(better, found, kept, out=kept)
    return slope_N * range_N, best_code_N, low_N + mean_N * range_N


def scale_search(
    values_SB: torch.Tensor, shares_SB: torch.Tensor, codes: tuple[int, int] = (0, LARGEST_SCALE)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a float16 factor of each super-block, [S, 1], and whole numbers in a range, float32 [S, B], so that their
    products are near values, which are not negative where the range starts at 0.

    Candidates are judged by the factor that is stored: small weights have factors that float16 holds with few bits.
    """
    if values_SB.is_cuda:
        from dsquant.kernels import scale_search_triton

        return scale_search_triton.stored_factors(values_SB, shares_SB, codes)
    return scale_search_reference(values_SB, shares_SB, codes)


def scale_search_reference(
    values_SB: torch.Tensor, shares_SB: torch.Tensor, codes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_search` in PyTorch, on any device."""
    least, largest = codes
    # the furthest value is near the end of the range that is further from 0
    reach, extreme_S1 = largest, values_SB.amax(1, keepdim=True)
    if least:
        reach, extreme_S1 = -least, -signed_largest(values_SB, 1)
    safe_extreme_S1 = torch.where(extreme_S1.abs() < LEAST, LEAST, extreme_S1)
    unit_SB = values_SB / safe_extreme_S1
    shares_SB = shares_SB / shares_SB.sum(1, keepdim=True).clamp(min=LEAST)
    best = torch.full_like(extreme_S1, torch.inf)
    best_factor, best_codes = torch.zeros_like(extreme_S1).half(), torch.zeros_like(unit_SB)
    for number in range(SCALE_TRIES):
        tried = reach + (SCALE_FIRST + SCALE_STEP * number) * (reach / LARGEST_SCALE)
        codes_SB = (unit_SB * tried).round_().clamp_(least, largest)
        product = (shares_SB * codes_SB * unit_SB).sum(1, keepdim=True)
        square = (shares_SB * codes_SB.square()).sum(1, keepdim=True).clamp(min=LEAST)
        factor = (product / square * extreme_S1).half()
        stored = factor.float() / safe_extreme_S1
        codes_SB = (unit_SB / stored.clamp(min=LEAST)).clamp_(least, largest).round_()
        error = (shares_SB * (unit_SB - stored * codes_SB).square()).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_factor = torch.where(better, factor, best_factor)
        best_codes = torch.where(better, codes_SB, best_codes)
    return best_factor, best_codes


def signed_largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the value furthest from zero along a dimension, which stays."""
    largest, smallest = values.amax(dim, keepdim=True), values.amin(dim, keepdim=True)
    return torch.where(largest >= -smallest, largest, smallest)


def symmetric_search(weight_WN: torch.Tensor, weights_WN: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns the scale of each block, float32 [N], so that scale * level has the least weighted squared error.

    Levels are whole numbers around 0 or a table's. The weight furthest from zero is near the end that is further from
    0, so scales may be negative.
    """
    if weight_WN.is_cuda:
        from dsquant.kernels import scale_search_triton

        return scale_search_triton.symmetric_search(weight_WN, weights_WN, levels)
    return symmetric_search_reference(weight_WN, weights_WN, levels)


def symmetric_search_reference(weight_WN: torch.Tensor, weights_WN: torch.Tensor, levels: Levels) -> torch.Tensor:
    """`symmetric_search` in PyTorch, on any device."""
    extreme_1N = signed_largest(weight_WN, 0)
    unit_WN = weight_WN / torch.where(extreme_1N != 0, -extreme_1N, torch.inf)
    weights_WN = weights_WN / weights_WN.sum(0).clamp_(min=LEAST)
    best_N, scale_N = torch.zeros_like(extreme_1N[0]), torch.zeros_like(extreme_1N[0])
    codes_WN, weighted_WN = torch.empty_like(unit_WN), torch.empty_like(unit_WN)
    for tried in symmetric_candidates(levels):
        torch.mul(unit_WN, tried, out=codes_WN)
        if levels.kind == Kind.TABLE:
            codes_WN = nearest_levels(codes_WN, levels)
        else:
            codes_WN.round_().clamp_(-levels.middle, levels.largest - levels.middle)
        torch.mul(weights_WN, codes_WN, out=weighted_WN)
        square_N = codes_WN.mul_(weighted_WN).sum(0).clamp_(min=LEAST)
        product_N = weighted_WN.mul_(unit_WN).sum(0)
        scale = product_N / square_N
        better = scale * product_N > best_N * BETTER
        for kept, found in ((best_N, scale * product_N), (scale_N, scale)):
            torch.where(better, found, kept, out=kept)
    return scale_N * -extreme_1N[0]
