"""ggml's types of less than 3.5 bits, in PyTorch: the reference of the Triton kernels.

Their weights are not rounded one by one: 8 (4 in IQ3) neighbours together take a point of a code book, times the scale
of their block. With importances w and a block's scale s, the squared error of a point g is
sum(w x^2) - 2 s sum(w x g) + s^2 sum(w g^2). Neither sum depends on s, so they are computed once for every point, and
each candidate scale costs one minimum over them. ggml tries the neighbours of a rounded vector instead; all points are
tried here, with the sign that an odd number of minus signs has to give up chosen point by point.
Reference for layouts and importances: `quantize_row_iq*_impl` in ggml-quants.c, https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, S super-blocks of 256 weights, B blocks of a super-block (one scale each), N blocks,
G vectors of a block, P weights of a vector, K points of a code book, A alternatives of a block.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

SUPER_BLOCK = 256
LEAST = 1e-30
# Scales that are tried for a block, and steps from the level next to the best of them.
CANDIDATES = 8
LEVEL_STEPS = (0, -1, 1)
# Factors of a super-block that are tried, relative to that with which the highest level is its largest scale.
FACTOR_FIRST, FACTOR_STEP, FACTOR_TRIES = 0.80, 0.025, 16
# Products of vectors and points that are held together.
PRODUCTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class CodeBookType:
    """How a type stores 256 weights."""

    size: int
    """Bytes of a super-block."""
    block: int
    """Weights that share a scale."""
    unit: float
    """What the code book's smallest step stands for, as gguf-py's tables have them."""
    signs: Literal["even", "free", "delta"]
    """even: 7 bits for 8 signs, an even number of them minus; free: 8 bits; delta: the points have signs, and are
    shifted by an eighth up or down."""
    levels: int
    """Scales of a block: d * (2 * level + 1) with d the super-block's float16."""
    spread: float
    """Importances are multiplied by sqrt(spread * mean square of the super-block + x^2)."""
    candidates: tuple[float, float]
    """The first and the last scale to try, relative to that with which the largest point reaches the largest weight."""


TYPES = {
    "IQ1_S": CodeBookType(50, 32, 1.0, "delta", 8, 2.0, (0.2, 1.1)),
    "IQ1_M": CodeBookType(56, 16, 1.0, "delta", 8, 2.0, (0.2, 1.1)),
    "IQ2_XXS": CodeBookType(66, 32, 1 / 8, "even", 16, 1.0, (0.5, 1.3)),
    "IQ2_XS": CodeBookType(74, 16, 1 / 8, "even", 16, 1.0, (0.5, 1.3)),
    "IQ2_S": CodeBookType(82, 16, 1 / 8, "free", 16, 2.0, (0.5, 1.3)),
    "IQ3_XXS": CodeBookType(98, 32, 1 / 4, "even", 16, 1.0, (0.5, 1.3)),
    "IQ3_S": CodeBookType(110, 32, 1.0, "free", 16, 2.0, (0.5, 1.3)),
}


@cache
def points_of(type_name: str) -> torch.Tensor:
    """The code book of a type, from gguf-py's tables.

    Args:
        type_name: a key of `TYPES`.

    Returns:
        float32 [A, K, P]: what each point multiplies d * (2 * level + 1) with; two alternatives for IQ1_S, whose blocks
        shift all points up or down.
    """
    from gguf import quants

    kind, table = TYPES[type_name], getattr(quants, type_name)
    table.init_grid()
    points_KP = torch.from_numpy(table.grid.reshape(table.grid_shape).copy()).float() * kind.unit
    if kind.signs != "delta":
        return points_KP.unsqueeze(0)
    both_AKP = torch.stack([points_KP + float(table.delta), points_KP - float(table.delta)])
    return both_AKP if type_name == "IQ1_S" else both_AKP.flatten(0, 1).unsqueeze(0)


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """Quantizes rows.

    Args:
        rows_RI: float32 [R, I], on any device.
        type_name: a key of `TYPES`; I is a multiple of 256.
        importance_I: float32 [I], positive: the weight of each column's squared error.

    Returns:
        uint8 [R, bytes of a row], on the same device.
    """
    kind, (num_rows, num_columns) = TYPES[type_name], rows_RI.shape
    points_AKP = points_of(type_name).to(rows_RI.device)
    weight_SW = rows_RI.float().reshape(-1, SUPER_BLOCK)
    importance_SW = importance_I.to(weight_SW).expand(num_rows, -1).reshape(-1, SUPER_BLOCK)
    vectors = SUPER_BLOCK // points_AKP.shape[2]
    products = 64 if rows_RI.is_cuda else vectors * points_AKP[:, :, 0].numel()  # a GPU's kernel keeps none of them
    at_once = max(1, PRODUCTS_AT_ONCE // products)
    parts = zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True)
    stored = [_quantize(weight, weights, type_name, points_AKP) for weight, weights in parts]
    return torch.cat(stored).view(num_rows, num_columns // SUPER_BLOCK * kind.size)


def _quantize(
    weight_SW: torch.Tensor, importance_SW: torch.Tensor, type_name: str, points_AKP: torch.Tensor
) -> torch.Tensor:
    kind = TYPES[type_name]
    vectors = vectors_of(weight_SW, importance_SW, kind, points_AKP)
    if weight_SW.is_cuda:
        from dsquant.kernels import code_books_triton

        chosen = code_books_triton.search(vectors)
    else:
        chosen = search(vectors)
    return _PACKED[type_name](chosen, vectors)


@dataclass(frozen=True)
class Vectors:
    """Super-blocks cut into the vectors that take a point each."""

    weight_NGP: torch.Tensor
    """float32."""
    importance_NGP: torch.Tensor
    """float32, what each weight's squared error is multiplied with."""
    points_AKP: torch.Tensor
    kind: CodeBookType

    @property
    def num_supers(self) -> int:
        """S."""
        return self.weight_NGP.numel() // SUPER_BLOCK

    @property
    def odd_NG(self) -> torch.Tensor:
        """Whether the 8 weights that a vector is of have an odd number of minus signs, bool [N, G]."""
        per_signs = 8 // self.weight_NGP.shape[2]
        negative = (self.weight_NGP < 0).sum(2).unflatten(1, (-1, per_signs)).sum(2)
        return (negative % 2 == 1).repeat_interleave(per_signs, 1)


def vectors_of(
    weight_SW: torch.Tensor, importance_SW: torch.Tensor, kind: CodeBookType, points_AKP: torch.Tensor
) -> Vectors:
    """Cuts super-blocks into vectors; importances become those that ggml searches with.

    Args:
        weight_SW: float32 [S, 256].
        importance_SW: float32 [S, 256].
        kind: the type.
        points_AKP: its code book.

    Returns:
        The vectors.
    """
    spread_S1 = kind.spread * weight_SW.square().mean(1, keepdim=True)
    importance_SW = importance_SW * (spread_S1 + weight_SW.square()).sqrt()
    width = points_AKP.shape[2]
    shape = (-1, kind.block // width, width)
    return Vectors(weight_SW.reshape(shape), importance_SW.reshape(shape), points_AKP, kind)


@dataclass(frozen=True)
class Chosen:
    """What a search stores."""

    factor_S: torch.Tensor
    """float16 [S]."""
    level_N: torch.Tensor
    """int64 [N]."""
    index_NG: torch.Tensor
    """int64 [N, G]."""
    flipped_NG: torch.Tensor
    """bool [N, G], whether a sign of this vector is given up."""
    alternative_N: torch.Tensor
    """int64 [N]."""


def search(vectors: Vectors) -> Chosen:
    """Chooses scales and points.

    Args:
        vectors: of whole super-blocks.

    Returns:
        What to store.
    """
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
    return Chosen(factor_S, best_level_N.long(), best.index_NG, best.flipped_NG, best.alternative_N)


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


def _negative(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    """The signs of chosen points, bool [N, G, P], True for minus; for types whose points have none."""
    given_up_NGP = vectors.importance_NGP * vectors.weight_NGP.abs() * vectors.points_AKP[0][chosen.index_NG]
    place_NG1 = given_up_NGP.argmin(2, keepdim=True)
    flips_NGP = torch.zeros_like(given_up_NGP, dtype=torch.bool).scatter_(2, place_NG1, chosen.flipped_NG.unsqueeze(2))
    return (vectors.weight_NGP < 0) ^ flips_NGP


def _bits(values: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers in the last dimension side by side, `width` bits each, the first lowest."""
    return (values.long() << (torch.arange(values.shape[-1], device=values.device) * width)).sum(-1)


def _as_bytes(values: torch.Tensor, count: int, num_supers: int) -> torch.Tensor:
    """Little-endian bytes of whole numbers, uint8 [S, ...]."""
    shifts = torch.arange(count, device=values.device) * 8
    return ((values.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).view(num_supers, -1)


def _half(factor_S: torch.Tensor) -> torch.Tensor:
    return factor_S.unsqueeze(1).view(torch.uint8)


def _signs(chosen: Chosen, vectors: Vectors, width: int) -> torch.Tensor:
    """The signs of each 8 weights, `width` bits of them, int64 [N, weights / 8]."""
    negative = _negative(chosen, vectors).flatten(1).unflatten(1, (-1, 8))
    return _bits(negative[..., :width], 1)


def _with_scales(chosen: Chosen, vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ2_XXS and IQ3_XXS: each block's indices, and its signs of 7 bits with its level above them."""
    words_N = _bits(_signs(chosen, vectors, 7), 7) | (chosen.level_N << 28)
    num_supers = vectors.num_supers
    return _as_bytes(chosen.index_NG, 1, num_supers), _as_bytes(words_N, 4, num_supers)


def _iq2_xxs(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    indices, words = (part.unflatten(1, (8, 4)) for part in _with_scales(chosen, vectors))
    return torch.cat([_half(chosen.factor_S), torch.cat([indices, words], 2).flatten(1)], 1)


def _iq3_xxs(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    return torch.cat([_half(chosen.factor_S), *_with_scales(chosen, vectors)], 1)


def _nibble_levels(chosen: Chosen, num_supers: int) -> torch.Tensor:
    return _as_bytes(_bits(chosen.level_N.view(-1, 2), 4), 1, num_supers)


def _iq2_xs(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    words_NG = chosen.index_NG | (_signs(chosen, vectors, 7) << 9)
    num_supers = vectors.num_supers
    return torch.cat(
        [_half(chosen.factor_S), _as_bytes(words_NG, 2, num_supers), _nibble_levels(chosen, num_supers)], 1
    )


def _iq2_s(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    index, num_supers = chosen.index_NG, vectors.num_supers
    high = _bits((index >> 8).view(-1, 4), 2)
    parts = (index & 255, _signs(chosen, vectors, 8), high)
    packed = [_as_bytes(part, 1, num_supers) for part in parts]
    return torch.cat([_half(chosen.factor_S), *packed, _nibble_levels(chosen, num_supers)], 1)


def _iq3_s(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    index, num_supers = chosen.index_NG, vectors.num_supers
    high = _bits((index >> 8).view(-1, 8), 1)
    parts = (index & 255, high, _signs(chosen, vectors, 8))
    packed = [_as_bytes(part, 1, num_supers) for part in parts]
    return torch.cat([_half(chosen.factor_S), *packed, _nibble_levels(chosen, num_supers)], 1)


def _iq1_s(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    index, num_supers = chosen.index_NG, vectors.num_supers
    words_N = _bits(index >> 8, 3) | (chosen.level_N << 12) | (chosen.alternative_N << 15)
    return torch.cat(
        [_half(chosen.factor_S), _as_bytes(index & 255, 1, num_supers), _as_bytes(words_N, 2, num_supers)], 1
    )


def _iq1_m(chosen: Chosen, vectors: Vectors) -> torch.Tensor:
    index, num_supers = chosen.index_NG, vectors.num_supers
    high = (index >> 8) & 7 | (index >> 11) << 3  # the second half of the points is shifted down
    factor_bits = chosen.factor_S.view(torch.int16).long() & 0xFFFF
    quarters_S4 = (factor_bits.unsqueeze(1) >> (4 * torch.arange(4, device=index.device))) & 15
    words_S4 = _bits(chosen.level_N.view(num_supers, 4, 4), 3) | (quarters_S4 << 12)
    packed = [_as_bytes(part, 1, num_supers) for part in (index & 255, _bits(high.view(-1, 2), 4))]
    return torch.cat([*packed, _as_bytes(words_S4, 2, num_supers)], 1)


_PACKED = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}  # fmt: skip
