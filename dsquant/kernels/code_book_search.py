"""The search of ggml's types with code books, in PyTorch: the reference of the Triton kernels.

With importances w and a block's scale s, the squared error of a point g is
sum(w x^2) - 2 s sum(w x g) + s^2 sum(w g^2). Neither sum depends on s, so they are computed once for every point, and
each candidate scale costs one minimum over them. ggml tries the neighbours of a rounded vector instead; all points are
tried here, with the sign that an odd number of minus signs has to give up chosen point by point.

Shape legend: as in `code_books`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsquant.kernels.code_books import (
    LEAST,
    TYPES,
    Chosen,
    CodeBookType,
    Vectors,
    packed,
    points_of,
    points_on,
    signs_of,
    vectors_of,
)
from dsquant.kernels.values import SUPER_BLOCK

# Scales that are tried for a block, and steps from the level next to the best of them.
CANDIDATES = 8
LEVEL_STEPS = (0, -1, 1)
# Factors of a super-block that are tried, relative to that with which the highest level is its largest scale.
FACTOR_FIRST, FACTOR_STEP, FACTOR_TRIES = 0.80, 0.025, 16
# Products of vectors and points that are held together.
PRODUCTS_AT_ONCE = 2**22


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """Quantizes float32 rows [R, I], I a multiple of 256, to a key of `TYPES`: uint8 [R, bytes of a row].

    `importance_I`, float32 and positive, weighs each column's squared error.
    """
    points_AKP = points_of(type_name)
    vectors = SUPER_BLOCK // points_AKP.shape[2]
    at_once = max(1, PRODUCTS_AT_ONCE // (vectors * points_AKP[:, :, 0].numel()))
    return quantize_with(search, rows_RI, type_name, importance_I, at_once)


def quantize_with(
    find: Callable[["Vectors"], "Chosen"],
    rows_RI: torch.Tensor,
    type_name: str,
    importance_I: torch.Tensor,
    at_once: int,
) -> torch.Tensor:
    """`quantize` with a search, of so many super-blocks at once, on the rows' device."""
    kind, (num_rows, num_columns) = TYPES[type_name], rows_RI.shape
    points_AKP = points_on(rows_RI.device, type_name)
    weight_SW = rows_RI.float().reshape(-1, SUPER_BLOCK)
    importance_SW = importance_I.to(weight_SW).expand(num_rows, -1).reshape(-1, SUPER_BLOCK)
    stored = []
    for weight, weights in zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True):
        vectors = vectors_of(weight, weights, kind, points_AKP)
        stored.append(packed(find(vectors), type_name))
    return torch.cat(stored).view(num_rows, num_columns // SUPER_BLOCK * kind.size)


def search(vectors: Vectors) -> Chosen:
    """Chooses scales and points for whole super-blocks."""
    products = _Products(vectors)
    scale_N, energy_N = _scale_search(products)
    factor_S, level_N = _levels(scale_N, energy_N, vectors.kind)
    factor_N = factor_S.float().repeat_interleave(len(level_N) // len(factor_S))
    best, best_level_N = products.nearest(factor_N * (2 * level_N + 1)), level_N
    for step in LEVEL_STEPS[1:]:
        tried_N = (level_N + step).clamp(0, vectors.kind.levels - 1)
        points = products.nearest(factor_N * (2 * tried_N + 1))
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


class _Products:
    """The products of all vectors and points, which every scale shares."""

    def __init__(self, vectors: Vectors) -> None:
        points_AKP, kind = vectors.points_AKP, vectors.kind
        values_NGP = vectors.weight_NGP if kind.signs == "delta" else vectors.weight_NGP.abs()
        weighted_NGP = vectors.importance_NGP * values_NGP
        self.vectors = vectors
        self.product_ANGK = torch.stack([weighted_NGP @ points_KP.T for points_KP in points_AKP])
        self.energy_ANGK = torch.stack([vectors.importance_NGP @ points_KP.square().T for points_KP in points_AKP])
        self.flipped_NGK = None
        if kind.signs == "even":  # what is left of a point's product where the cheapest of its signs is given up
            given_up_NGK = torch.full_like(self.product_ANGK[0], torch.inf)
            for weighted_NG, points_K in zip(weighted_NGP.unbind(2), points_AKP[0].unbind(1), strict=True):
                given_up_NGK = torch.minimum(given_up_NGK, weighted_NG.unsqueeze(2) * points_K)
            self.flipped_NGK = self.product_ANGK[0] - 2 * given_up_NGK

    def nearest(self, scale_N: torch.Tensor) -> Points:
        """The points of least error under scales, float32 [N]."""
        found = [self._nearest_of(alternative, scale_N) for alternative in range(len(self.product_ANGK))]
        best = found[0]
        for other in found[1:]:
            best = best.or_better(other, other.error_N < best.error_N)
        return best

    def _nearest_of(self, alternative: int, scale_N: torch.Tensor) -> Points:
        scale_N11 = scale_N.view(-1, 1, 1)
        square_NGK = self.energy_ANGK[alternative] * scale_N11.square()
        product_NGK = self.product_ANGK[alternative]
        error_NG, index_NG = (square_NGK - 2 * scale_N11 * product_NGK).min(2)
        product_NG = product_NGK.gather(2, index_NG.unsqueeze(2)).squeeze(2)
        flipped_NG = torch.zeros_like(index_NG, dtype=torch.bool)
        if self.flipped_NGK is not None:
            found_NG, place_NG = (square_NGK - 2 * scale_N11 * self.flipped_NGK).min(2)
            cost = (found_NG - error_NG).unflatten(1, (-1, 8 // self.vectors.weight_NGP.shape[2]))
            cheapest = torch.zeros_like(cost, dtype=torch.bool).scatter_(2, cost.argmin(2, keepdim=True), True)
            flipped_NG = cheapest.flatten(1) & self.vectors.odd_NG
            error_NG = torch.where(flipped_NG, found_NG, error_NG)
            index_NG = torch.where(flipped_NG, place_NG, index_NG)
            of_flipped_NG = self.flipped_NGK.gather(2, place_NG.unsqueeze(2)).squeeze(2)
            product_NG = torch.where(flipped_NG, of_flipped_NG, product_NG)
        energy_NG = self.energy_ANGK[alternative].gather(2, index_NG.unsqueeze(2)).squeeze(2)
        number_N = torch.full_like(index_NG[:, 0], alternative)
        return Points(error_NG.sum(1), product_NG.sum(1), energy_NG.sum(1), index_NG, flipped_NG, number_N)


def _scale_search(products: _Products) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each block that leaves the least error, float32 [N], and the energy of its points."""
    vectors = products.vectors
    reaching_N = vectors.weight_NGP.abs().amax((1, 2)) / float(vectors.points_AKP.abs().max())
    first, last = vectors.kind.candidates
    best_gain_N, best_N, energy_N = (torch.zeros_like(reaching_N) for _ in range(3))
    for step in range(CANDIDATES + 1):
        candidate_N = best_N if step == CANDIDATES else reaching_N * (first + (last - first) * step / (CANDIDATES - 1))
        points = products.nearest(candidate_N)
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
