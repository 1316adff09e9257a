"""The search of ggml's types with code books, in PyTorch: the reference of the Triton kernels.

With importances w and a block's scale s, the squared error of a point g is
sum(w x^2) - 2 s sum(w x g) + s^2 sum(w g^2). Every scale that is tried for a block tries the points near its vectors.

Shape legend: as in `code_books` and `code_book_neighbours`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsquant.kernels.code_book_neighbours import nearest
from dsquant.kernels.code_books import (
    LEAST,
    TYPES,
    VECTOR,
    Chosen,
    CodeBookType,
    Vectors,
    packed,
    points_of,
    shifts_of,
    signs_of,
    vectors_of,
)
from dsquant.kernels.values import SUPER_BLOCK

# Scales that are tried for a block, and steps from the level next to the best of them.
CANDIDATES = 8
LEVEL_STEPS = (0, -1, 1)
# Factors of a super-block that are tried, relative to that with which the highest level is its largest scale.
FACTOR_FIRST, FACTOR_STEP, FACTOR_TRIES = 0.80, 0.025, 16
# Super-blocks that are searched together.
SUPERS_AT_ONCE = 2**8


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """Quantizes float32 rows [R, I], I a multiple of 256, to a key of `TYPES`: uint8 [R, bytes of a row].

    `importance_I`, float32 and positive, weighs each column's squared error.
    """
    return quantize_with(search, rows_RI, type_name, importance_I, SUPERS_AT_ONCE)


def quantize_with(
    find: Callable[["Vectors"], "Chosen"],
    rows_RI: torch.Tensor,
    type_name: str,
    importance_I: torch.Tensor,
    at_once: int,
) -> torch.Tensor:
    """`quantize` with a search, of so many super-blocks at once, on the rows' device."""
    kind, (num_rows, num_columns) = TYPES[type_name], rows_RI.shape
    weight_SW = rows_RI.float().reshape(-1, SUPER_BLOCK)
    importance_SW = importance_I.to(weight_SW).expand(num_rows, -1).reshape(-1, SUPER_BLOCK)
    stored = []
    for weight, weights in zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True):
        stored.append(packed(find(vectors_of(weight, weights, type_name)), type_name))
    return torch.cat(stored).view(num_rows, num_columns // SUPER_BLOCK * kind.size)


def search(vectors: Vectors) -> Chosen:
    """Chooses scales and points for whole super-blocks."""
    scale_N, energy_N = _scale_search(vectors)
    factor_S, level_N = _levels(scale_N, energy_N, vectors.kind)
    factor_N = factor_S.float().repeat_interleave(len(level_N) // len(factor_S))
    best, best_level_N = _nearest(vectors, factor_N * (2 * level_N + 1)), level_N
    for step in LEVEL_STEPS[1:]:
        tried_N = (level_N + step).clamp(0, vectors.kind.levels - 1)
        points = _nearest(vectors, factor_N * (2 * tried_N + 1))
        better_N = points.error_N < best.error_N
        best, best_level_N = best.or_better(points, better_N), torch.where(better_N, tried_N, best_level_N)
    negative_NGP = signs_of(vectors, best.index_NG, best.flipped_NG)
    return Chosen(factor_S, best_level_N.long(), best.index_NG, negative_NGP, best.alternative_N)


@dataclass(frozen=True)
class Points:
    """A point for each vector."""

    error_N: torch.Tensor
    """float32 [N], weighted squared error of each block, without the constant sum(w x^2)."""
    product_N: torch.Tensor
    """float32 [N], sum(w x g)."""
    energy_N: torch.Tensor
    """float32 [N], sum(w g^2)."""
    index_NG: torch.Tensor
    """int64 [N, G]."""
    flipped_NG: torch.Tensor
    """bool [N, G], whether a sign of this vector is given up."""
    alternative_N: torch.Tensor
    """int64 [N]."""

    def or_better(self, other: "Points", better_N: torch.Tensor) -> "Points":
        """These blocks, and another's where `better_N` says so."""

        def either(own: torch.Tensor, its: torch.Tensor) -> torch.Tensor:
            return torch.where(better_N.view(-1, *[1] * (own.dim() - 1)), its, own)

        return Points(*(either(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))


def _nearest(vectors: Vectors, scale_N: torch.Tensor) -> Points:
    """The points of least error under scales, float32 [N]."""
    width, num_blocks = vectors.weight_NGP.shape[2], len(scale_N)
    values_EGP, importance_EGP = (
        part.reshape(-1, VECTOR // width, width) for part in (vectors.weight_NGP, vectors.importance_NGP)
    )
    scale_E = scale_N.repeat_interleave(len(values_EGP) // num_blocks)

    def of_blocks(part_EG: torch.Tensor) -> torch.Tensor:
        return part_EG.view(num_blocks, -1)

    found, *others = (
        nearest(values_EGP, importance_EGP, scale_E, shift, vectors.type_name)
        for shift in range(len(shifts_of(vectors.type_name)))
    )
    for other in others:
        better_EG = other.error_EG < found.error_EG
        if vectors.kind.shifted == "blocks":
            better_N = of_blocks(other.error_EG).sum(1) < of_blocks(found.error_EG).sum(1)
            better_EG = better_N.repeat_interleave(better_EG.numel() // num_blocks).view_as(better_EG)
        found = found.where(other, better_EG)
    number_NG, num_points = of_blocks(found.number_EG), points_of(vectors.type_name).shape[1]
    return Points(
        error_N=of_blocks(found.error_EG).sum(1),
        product_N=of_blocks(found.product_EG).sum(1),
        energy_N=of_blocks(found.energy_EG).sum(1),
        index_NG=number_NG % num_points,
        flipped_NG=of_blocks(found.flipped_EG),
        alternative_N=number_NG[:, 0] // num_points,
    )


def _scale_search(vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each block that leaves the least error, float32 [N], and the energy of its points."""
    reaching_N = vectors.weight_NGP.abs().amax((1, 2)) / float(points_of(vectors.type_name).abs().max())
    first, last = vectors.kind.candidates
    best_gain_N, best_N, energy_N = (torch.zeros_like(reaching_N) for _ in range(3))
    for step in range(CANDIDATES + 1):
        candidate_N = best_N if step == CANDIDATES else reaching_N * (first + (last - first) * step / (CANDIDATES - 1))
        points = _nearest(vectors, candidate_N)
        fitted_N = (points.product_N / points.energy_N.clamp(min=LEAST)).clamp(min=0)
        gain_N = fitted_N * points.product_N
        better_N = gain_N > best_gain_N
        best_gain_N = torch.where(better_N, gain_N, best_gain_N)
        best_N = torch.where(better_N, fitted_N, best_N)
        energy_N = torch.where(better_N, points.energy_N, energy_N)
    return best_N, energy_N


def _levels(scale_N: torch.Tensor, energy_N: torch.Tensor, kind: CodeBookType) -> tuple[torch.Tensor, torch.Tensor]:
    """The super-blocks' float16 factors [S], and each block's level, float32 [N]."""
    scale_SB, energy_SB = (values.view(-1, SUPER_BLOCK // kind.block) for values in (scale_N, energy_N))
    whole_S1 = scale_SB.amax(1, keepdim=True) / (2 * kind.levels - 1)
    best_S1 = torch.full_like(whole_S1, torch.inf)
    factor_S1, level_SB = torch.zeros_like(whole_S1).half(), torch.zeros_like(scale_SB)
    for number in range(FACTOR_TRIES):
        tried_S1 = (whole_S1 * (FACTOR_FIRST + FACTOR_STEP * number)).half()
        steps_SB = scale_SB / tried_S1.float().clamp(min=LEAST)
        levels_SB = ((steps_SB - 1) / 2).round().clamp(0, kind.levels - 1)
        missed_SB = tried_S1.float() * (2 * levels_SB + 1) - scale_SB
        error_S1 = (energy_SB * missed_SB.square()).sum(1, keepdim=True)
        better_S1 = error_S1 < best_S1
        best_S1 = torch.where(better_S1, error_S1, best_S1)
        factor_S1 = torch.where(better_S1, tried_S1, factor_S1)
        level_SB = torch.where(better_S1, levels_SB, level_SB)
    return factor_S1.squeeze(1), level_SB.flatten()
