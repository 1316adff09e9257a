"""Packs weights that are rounded to ggml's types as its bytes.

Reference: the structs in ggml-common.h and the decoders in ggml-quants.c, https://github.com/ggml-org/ggml

Shape legend: O out features, I in features, S super-blocks or blocks of 32, W weights of one, B blocks of one, N bytes.
"""

from collections.abc import Callable

import torch

from dsquant.kernels import code_books
from dsquant.kernels.code_book_rounding import points_of_codes
from dsquant.kernels.k_quants import nibbles, six_bits
from dsquant.kernels.values import Kind
from dsquant.schemes import QuantizedWeight
from dsquant.schemes.code_book_types import CodeBook
from dsquant.schemes.ggml_types import GgmlType


def packed(weight: QuantizedWeight) -> torch.Tensor:
    """Packs a weight [O, I] of a scheme `GgmlType` as ggml stores it: uint8 [O, bytes of a row], on its device."""
    scheme = weight.grid
    if isinstance(scheme, CodeBook):
        return _points(weight, scheme)
    assert isinstance(scheme, GgmlType), f"{scheme} is no type of ggml; please report this"
    blocks = scheme.group_size // scheme.block_size
    numbers = [weight.scales_OG, *([weight.zero_points_OG] if scheme.levels.kind == Kind.OFFSETS else [])]
    products = [part.reshape(-1, blocks) for part in numbers]
    if weight.super_scales_OG:
        supers = [part.reshape(-1, blocks) for part in weight.super_scales_OG]
        factors = [part[:, :1] for part in supers]
        whole = [
            (product / torch.where(part != 0, part, torch.inf)).round().to(torch.int16)
            for product, part in zip(products, supers, strict=True)
        ]
    else:  # a minimum, where an offset is subtracted
        factors, whole = [products[0], *(-part for part in products[1:])], []
    halves_SN = torch.cat([factor.half() for factor in factors], 1).view(torch.uint8)
    codes_SW = weight.codes_OI.reshape(-1, scheme.group_size)
    return _PACKERS[scheme.name](halves_SN, whole, codes_SW).reshape(len(weight.codes_OI), -1)


def _points(weight: QuantizedWeight, scheme: CodeBook) -> torch.Tensor:
    codes_NB = weight.codes_OI.reshape(-1, scheme.block_size)
    scale_N, factor_N = weight.scales_OG.flatten(), weight.super_scales_OG[0].flatten()
    level_N = ((scale_N / torch.where(factor_N != 0, factor_N, torch.inf) - 1) / 2).round().clamp(min=0).long()
    factor_S = factor_N[:: scheme.group_size // scheme.block_size].half()
    return code_books.packed(points_of_codes(codes_NB, factor_S, level_N, scheme.name), scheme.name).reshape(
        len(weight.codes_OI), -1
    )


Packer = Callable[[torch.Tensor, list[torch.Tensor], torch.Tensor], torch.Tensor]
"""Gets the float16 numbers as bytes [S, N], the whole numbers of scales and offsets, int16 [S, B], and the codes
[S, W]."""


def _bits(codes: torch.Tensor, shift: int, dim: int, step: int = 1) -> torch.Tensor:
    """Bytes of the bits from `shift` on of as many codes along a dimension as a byte takes, the first in its lowest."""
    width = [1] * codes.dim()
    width[dim] = codes.shape[dim]
    shifts = torch.arange(0, step * codes.shape[dim], step, dtype=torch.uint8, device=codes.device).view(width)
    return (((codes >> shift) & (2**step - 1)) << shifts).sum(dim, dtype=torch.uint8)


def _halves(codes_SW: torch.Tensor) -> torch.Tensor:
    """Bytes of the low four bits of codes j and j + 16 of each block of 32."""
    low, high = (codes_SW & 15).unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | (high << 4)).flatten(1)


def _quarters(codes_SW: torch.Tensor) -> torch.Tensor:
    """Bytes of the low two bits of codes l, l + 32, l + 64 and l + 96 of each half of a super-block."""
    return _bits(codes_SW.unflatten(1, (2, 4, 32)), 0, 2, 2).flatten(1)


def _q2_k(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    scales_SB, offsets_SB = (part.byte() for part in whole)
    return torch.cat([scales_SB | (offsets_SB << 4), _quarters(codes_SW), halves_SN], 1)


def _q3_k(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    masks = _bits(codes_SW.unflatten(1, (8, 32)), 2, 1)
    scales_SB = (whole[0] + 32).byte()
    low, high = (scales_SB & 15).chunk(2, 1)
    rest = _bits(scales_SB.unflatten(1, (4, 4)), 4, 1, 2)
    return torch.cat([masks, _quarters(codes_SW), low | (high << 4), rest, halves_SN], 1)


def _q4_k(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    return torch.cat([halves_SN, six_bits(*whole), nibbles(codes_SW.unflatten(1, (8, 32)))], 1)


def _q5_k(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    codes_SBW = codes_SW.unflatten(1, (8, 32))
    return torch.cat([halves_SN, six_bits(*whole), _bits(codes_SBW, 4, 1), nibbles(codes_SBW & 15)], 1)


def _q6_k(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    quarters_S22W = codes_SW.reshape(-1, 2, 4, 32)  # halves of 128 weights, their quarters of 32
    low, high = (quarters_S22W & 15).chunk(2, 2)
    signed_SB = whole[0].to(torch.int8).view(torch.uint8)
    return torch.cat(
        [(low | (high << 4)).flatten(1), _bits(quarters_S22W, 4, 2, 2).flatten(1), signed_SB, halves_SN], 1
    )


def _iq4_xs(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    scales_SB = (whole[0] + 32).byte()
    high = _bits(scales_SB.unflatten(1, (2, 4)), 4, 2, 2)
    low, next_low = (scales_SB & 15).unflatten(1, (4, 2)).unbind(2)
    return torch.cat([halves_SN, high, low | (next_low << 4), _halves(codes_SW)], 1)


def _four_bits(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    return torch.cat([halves_SN, _halves(codes_SW)], 1)


def _five_bits(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    high = _bits(codes_SW.unflatten(1, (4, 8)), 4, 2)
    return torch.cat([halves_SN, high, _halves(codes_SW)], 1)


def _q8_0(halves_SN: torch.Tensor, whole: list[torch.Tensor], codes_SW: torch.Tensor) -> torch.Tensor:
    return torch.cat([halves_SN, (codes_SW - 127)], 1)  # wraps around to int8's bits


_PACKERS: dict[str, Packer] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "IQ4_NL": _four_bits,
    "Q4_0": _four_bits,
    "Q4_1": _four_bits,
    "Q5_0": _five_bits,
    "Q5_1": _five_bits,
    "Q8_0": _q8_0,
}
