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

from dsquant.kernels.values import SUPER_BLOCK, Parameters

LEAST = 1e-30
# Columns whose signs are stored together: those of one point, or of two.
VECTOR = 8


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
    """even: 7 bits for 8 signs, an even number of them minus; free: 8 bits; delta: the points have signs."""
    levels: int
    """Scales of a block: d * (2 * level + 1) with d the super-block's float16."""
    spread: float
    """Importances are multiplied by sqrt(spread * mean square of the super-block + x^2)."""
    candidates: tuple[float, float]
    """The first and the last scale to try, relative to that with which the largest point reaches the largest weight."""
    neighbours: int = 32
    """Points near a vector that are tried."""
    shifted: Literal["", "blocks", "vectors"] = ""
    """What chooses whether points are shifted up or down."""


TYPES = {
    "IQ1_S": CodeBookType(50, 32, 1.0, "delta", 8, 2.0, (0.2, 1.1), shifted="blocks"),
    "IQ1_M": CodeBookType(56, 16, 1.0, "delta", 8, 2.0, (0.2, 1.1), shifted="vectors"),
    "IQ2_XXS": CodeBookType(66, 32, 1 / 8, "even", 16, 1.0, (0.5, 1.3), neighbours=64),
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
    points_AKP = torch.stack([points_KP + shift for shift in shifts_of(type_name)])
    return points_AKP if kind.shifted == "blocks" else points_AKP.flatten(0, 1).unsqueeze(0)


def shifts_of(type_name: str) -> tuple[float, ...]:
    """Returns what may be added to all values of a point."""
    from gguf import quants

    if not TYPES[type_name].shifted:
        return (0.0,)
    delta = float(getattr(quants, type_name).delta)
    return delta, -delta


@cache
def points_on(device: torch.device, type_name: str) -> torch.Tensor:
    """Copies `points_of` to a device once: work that a GPU replays copies nothing from the host."""
    return points_of(type_name).to(device)


@cache
def values_of(type_name: str) -> tuple[float, ...]:
    """Returns the values that a weight may have in units of its block's scale, ascending."""
    points_AKP = points_of(type_name)
    signed = points_AKP if TYPES[type_name].signs == "delta" else torch.stack([points_AKP, -points_AKP])
    return tuple(signed.unique().tolist())


@dataclass(frozen=True)
class Vectors:
    """Super-blocks cut into the vectors that take a point each."""

    weight_NGP: torch.Tensor
    """float32."""
    importance_NGP: torch.Tensor
    """float32, what each weight's squared error is multiplied with."""
    type_name: str

    @property
    def kind(self) -> CodeBookType:
        return TYPES[self.type_name]

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


def vectors_of(weight_SW: torch.Tensor, importance_SW: torch.Tensor, type_name: str) -> Vectors:
    """Cuts super-blocks and their importances, float32 [S, 256], into vectors for a type; importances become those that
    ggml searches with."""
    kind, width = TYPES[type_name], points_of(type_name).shape[2]
    spread_S1 = kind.spread * weight_SW.square().mean(1, keepdim=True)
    importance_SW = importance_SW * (spread_S1 + weight_SW.square()).sqrt()
    shape = (-1, kind.block // width, width)
    return Vectors(weight_SW.reshape(shape), importance_SW.reshape(shape), type_name)


@dataclass(frozen=True)
class Chosen:
    """What is stored."""

    factor_S: torch.Tensor
    """float16 [S]."""
    level_N: torch.Tensor
    """int64 [N]."""
    index_NG: torch.Tensor
    """int64 [N, G]."""
    negative_NGP: torch.Tensor
    """bool [N, G, P], the signs of points that have none of their own."""
    alternative_N: torch.Tensor
    """int64 [N]."""


@dataclass(frozen=True)
class BlockScales:
    """The scales of a weight's blocks."""

    scale_OB: torch.Tensor
    """float32."""
    factor_OB: torch.Tensor
    """float32, the super-block's; a scale is an odd multiple of it."""
    alternative_OB: torch.Tensor
    """int64, which of the code book's alternatives a block uses."""

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.scale_OB, torch.zeros_like(self.scale_OB), (self.factor_OB,))


def signs_of(vectors: Vectors, index_NG: torch.Tensor, flipped_NG: torch.Tensor) -> torch.Tensor:
    """The signs that chosen points get, bool [N, G, P], True for minus: the weights', and in a vector that is flipped
    (bool [N, G]) the one given up that costs the least."""
    points_KP = points_on(index_NG.device, vectors.type_name)[0]
    given_up_NGP = vectors.importance_NGP * vectors.weight_NGP.abs() * points_KP[index_NG]
    place_NG1 = given_up_NGP.argmin(2, keepdim=True)
    flips_NGP = torch.zeros_like(given_up_NGP, dtype=torch.bool).scatter_(2, place_NG1, flipped_NG.unsqueeze(2))
    return (vectors.weight_NGP < 0) ^ flips_NGP


def packed(chosen: Chosen, type_name: str) -> torch.Tensor:
    """Stores what was chosen: uint8 [S, bytes of a super-block]."""
    return _PACKED[type_name](chosen)


def _bits(values: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers in the last dimension side by side, `width` bits each, the first lowest."""
    return (values.long() << (torch.arange(values.shape[-1], device=values.device) * width)).sum(-1)


def _as_bytes(values: torch.Tensor, count: int, num_supers: int) -> torch.Tensor:
    """Little-endian bytes of whole numbers, uint8 [S, ...]."""
    shifts = torch.arange(count, device=values.device) * 8
    return ((values.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).view(num_supers, -1)


def _half(factor_S: torch.Tensor) -> torch.Tensor:
    return factor_S.unsqueeze(1).view(torch.uint8)


def _signs(chosen: Chosen, width: int) -> torch.Tensor:
    """The signs of each 8 weights, `width` bits of them, int64 [N, weights / 8]."""
    negative = chosen.negative_NGP.flatten(1).unflatten(1, (-1, 8))
    return _bits(negative[..., :width], 1)


def _with_scales(chosen: Chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ2_XXS and IQ3_XXS: each block's indices, and its signs of 7 bits with its level above them."""
    words_N = _bits(_signs(chosen, 7), 7) | (chosen.level_N << 28)
    num_supers = len(chosen.factor_S)
    return _as_bytes(chosen.index_NG, 1, num_supers), _as_bytes(words_N, 4, num_supers)


def _iq2_xxs(chosen: Chosen) -> torch.Tensor:
    indices, words = (part.unflatten(1, (8, 4)) for part in _with_scales(chosen))
    return torch.cat([_half(chosen.factor_S), torch.cat([indices, words], 2).flatten(1)], 1)


def _iq3_xxs(chosen: Chosen) -> torch.Tensor:
    return torch.cat([_half(chosen.factor_S), *_with_scales(chosen)], 1)


def _nibble_levels(chosen: Chosen, num_supers: int) -> torch.Tensor:
    return _as_bytes(_bits(chosen.level_N.view(-1, 2), 4), 1, num_supers)


def _iq2_xs(chosen: Chosen) -> torch.Tensor:
    words_NG = chosen.index_NG | (_signs(chosen, 7) << 9)
    num_supers = len(chosen.factor_S)
    return torch.cat(
        [_half(chosen.factor_S), _as_bytes(words_NG, 2, num_supers), _nibble_levels(chosen, num_supers)], 1
    )


def _iq2_s(chosen: Chosen) -> torch.Tensor:
    index, num_supers = chosen.index_NG, len(chosen.factor_S)
    high = _bits((index >> 8).view(-1, 4), 2)
    parts = (index & 255, _signs(chosen, 8), high)
    packed = [_as_bytes(part, 1, num_supers) for part in parts]
    return torch.cat([_half(chosen.factor_S), *packed, _nibble_levels(chosen, num_supers)], 1)


def _iq3_s(chosen: Chosen) -> torch.Tensor:
    index, num_supers = chosen.index_NG, len(chosen.factor_S)
    high = _bits((index >> 8).view(-1, 8), 1)
    parts = (index & 255, high, _signs(chosen, 8))
    packed = [_as_bytes(part, 1, num_supers) for part in parts]
    return torch.cat([_half(chosen.factor_S), *packed, _nibble_levels(chosen, num_supers)], 1)


def _iq1_s(chosen: Chosen) -> torch.Tensor:
    index, num_supers = chosen.index_NG, len(chosen.factor_S)
    words_N = _bits(index >> 8, 3) | (chosen.level_N << 12) | (chosen.alternative_N << 15)
    return torch.cat(
        [_half(chosen.factor_S), _as_bytes(index & 255, 1, num_supers), _as_bytes(words_N, 2, num_supers)], 1
    )


def _iq1_m(chosen: Chosen) -> torch.Tensor:
    index, num_supers = chosen.index_NG, len(chosen.factor_S)
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


def scales_of(stored_SN: torch.Tensor, type_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reads the scales of stored super-blocks: factors, float32 [S], blocks' levels and alternatives, int64 [S, B]."""
    words_SB = stored_SN.long()
    if type_name == "IQ1_M":
        words_S4 = words_SB[:, 48::2] | words_SB[:, 49::2] << 8
        level_SB = ((words_S4.unsqueeze(2) >> 3 * torch.arange(4, device=stored_SN.device)) & 7).flatten(1)
        factor_S = _bits(words_S4 >> 12, 4).to(torch.int16).view(torch.float16)
        return factor_S.float(), level_SB, torch.zeros_like(level_SB)
    factor_S = stored_SN[:, :2].contiguous().view(torch.float16).squeeze(1).float()
    if type_name == "IQ1_S":
        high_SB = words_SB[:, 35::2]
        return factor_S, (high_SB >> 4) & 7, high_SB >> 7
    if type_name in ("IQ2_XXS", "IQ3_XXS"):  # above the signs in words of 4 bytes, every second or at the end
        level_SB = (words_SB[:, 9::8] if type_name == "IQ2_XXS" else words_SB[:, 69::4]) >> 4
    else:
        pairs_SB = words_SB[:, -SUPER_BLOCK // TYPES[type_name].block // 2 :]
        level_SB = torch.stack([pairs_SB & 15, pairs_SB >> 4], 2).flatten(1)
    return factor_S, level_SB, torch.zeros_like(level_SB)
