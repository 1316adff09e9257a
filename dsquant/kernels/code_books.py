"""ggml's types of less than 3.5 bits: code books, their vectors of weights, and how the choices are stored.

Their weights are not rounded one by one: 8 (4 in IQ3) neighbours together take a point of a code book, times the scale
of their block.
Reference for layouts and importances: `quantize_row_iq*_impl` in ggml-quants.c, https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, S super-blocks of 256 weights, B blocks of a super-block (one scale each), N blocks,
G vectors of a block, P weights of a vector, K points of a code book, A alternatives of a block.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from dsquant.kernels.values import SUPER_BLOCK

LEAST = 1e-30


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
    """Returns the code book of a type, from gguf-py's tables: float32 [A, K, P].

    A point times d * (2 * level + 1) is a vector. Two alternatives for IQ1_S, whose blocks shift all points up or down.
    """
    from gguf import quants

    kind, table = TYPES[type_name], getattr(quants, type_name)
    table.init_grid()
    points_KP = torch.from_numpy(table.grid.reshape(table.grid_shape).copy()).float() * kind.unit
    if kind.signs != "delta":
        return points_KP.unsqueeze(0)
    both_AKP = torch.stack([points_KP + float(table.delta), points_KP - float(table.delta)])
    return both_AKP if type_name == "IQ1_S" else both_AKP.flatten(0, 1).unsqueeze(0)


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
    """Cuts super-blocks and their importances, float32 [S, 256], into vectors for a type and its code book; importances
    become those that ggml searches with."""
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


def packed(chosen: Chosen, vectors: Vectors, type_name: str) -> torch.Tensor:
    """Stores what a search has chosen: uint8 [S, bytes of a super-block]."""
    return _PACKED[type_name](chosen, vectors)


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
