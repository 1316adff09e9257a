"""Q4_K, Q5_K, Q6_K and Q8_0 in PyTorch: the reference of the Triton kernels, and the CPU's way without ggml.

Scales are found as `scale_search` says.
Reference: `quantize_q4_K`, `quantize_q5_K`, `quantize_q6_K` and `quantize_row_q8_0_ref` in ggml-quants.c,
https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, S super-blocks of 256 weights, B blocks of a super-block, W weights of a block,
N blocks.
"""

import torch

from dsquant.kernels.scale_search import (
    BlockShape,
    StoredScales,
    blocks_last,
    signed_largest,
    stored_scales,
    symmetric_search,
)
from dsquant.kernels.values import SUPER_BLOCK, Kind, Levels

# type -> bytes of a super-block; Q8_0 has plain blocks of 32 only
ROW_BLOCKS = {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_0": (32, 34)}
SCALE_CODES = (0, 63)
# Weights that are worked on together: what they need stays in a core's cache.
WEIGHTS_AT_ONCE = 2**17


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """Quantizes float32 rows [R, I] to uint8 [R, bytes of a row], on their device.

    `importance_I`, float32 and positive, weighs each column's squared error; I is a multiple of the type's block.
    """
    block, size = ROW_BLOCKS[type_name]
    num_rows, num_columns = rows_RI.shape
    stored_RN = torch.empty(num_rows, num_columns // block * size, dtype=torch.uint8, device=rows_RI.device)
    at_once = max(1, WEIGHTS_AT_ONCE // num_columns)
    for first in range(0, num_rows, at_once):
        part_RI = rows_RI[first : first + at_once].float()
        if type_name == "Q8_0":
            stored = _q8_0(part_RI)
        else:
            weights_SW = importance_I.to(part_RI).expand_as(part_RI).reshape(-1, SUPER_BLOCK)
            quantizer = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}[type_name]
            stored = quantizer(part_RI.reshape(-1, SUPER_BLOCK), weights_SW)
        stored_RN[first : first + at_once] = stored.reshape(len(part_RI), -1)
    return stored_RN


def _q4_k(weight_SW: torch.Tensor, importance_SW: torch.Tensor) -> torch.Tensor:
    header_SN, codes_SBW = _affine(weight_SW, importance_SW, 15)
    return torch.cat([header_SN, nibbles(codes_SBW)], 1)


def _q5_k(weight_SW: torch.Tensor, importance_SW: torch.Tensor) -> torch.Tensor:
    header_SN, codes_SBW = _affine(weight_SW, importance_SW, 31)
    high_SW = ((codes_SBW >> 4) << _shifts(codes_SBW, 8, 1)).sum(1, dtype=torch.uint8)
    return torch.cat([header_SN, high_SW, nibbles(codes_SBW & 15)], 1)


def nibbles(codes_SBW: torch.Tensor) -> torch.Tensor:
    """Blocks in pairs: the first one's codes are the low halves of 32 bytes, the second one's the high halves."""
    pairs = codes_SBW.unflatten(1, (4, 2))
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _shifts(like: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """uint8 [count, 1]: how far each block's bits are shifted."""
    return torch.arange(0, count * step, step, dtype=torch.uint8, device=like.device).unsqueeze(1)


def six_bits(scales_SB: torch.Tensor, offsets_SB: torch.Tensor) -> torch.Tensor:
    """Packs eight scales and eight offsets, whole numbers of six bits, into 12 bytes.

    The first four of each take six bits of a byte of their own and lend its other two to the last four.
    """
    (low, high), (low_offsets, high_offsets) = (part.byte().chunk(2, 1) for part in (scales_SB, offsets_SB))
    mixed = (high & 15) | ((high_offsets & 15) << 4)
    return torch.cat([low | ((high >> 4) << 6), low_offsets | ((high_offsets >> 4) << 6), mixed], 1)


def _affine_scales(weight_SW: torch.Tensor, importance_SW: torch.Tensor, steps: int) -> StoredScales:
    spread_S1 = 2 * weight_SW.square().mean(1, keepdim=True)
    weights_SW = importance_SW * (spread_S1 + weight_SW.square()).sqrt()
    return stored_scales(weight_SW, weights_SW, BlockShape(Levels(steps, Kind.OFFSETS), 32, SCALE_CODES))


def _affine(weight_SW: torch.Tensor, importance_SW: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 bytes of scales before the codes, and the codes."""
    found = _affine_scales(weight_SW, importance_SW, steps)
    scale_SB1, offset_SB1 = ((factor_S1.float() * codes_SB).unsqueeze(2) for factor_S1, codes_SB in found.factors)
    shifted_SBW = weight_SW.unflatten(1, (8, 32)) + offset_SB1
    codes_SBW = (shifted_SBW / torch.where(scale_SB1 > 0, scale_SB1, torch.inf)).round().clamp(0, steps)
    halves_SN, whole = zip(*found.factors, strict=True)
    return torch.cat([torch.cat(halves_SN, 1).view(torch.uint8), six_bits(*whole)], 1), codes_SBW.byte()


def _q6_k(weight_SW: torch.Tensor, importance_SW: torch.Tensor) -> torch.Tensor:
    weight_SBW, weights_SBW = weight_SW.unflatten(1, (16, 16)), importance_SW.unflatten(1, (16, 16))
    scale_SB = symmetric_search(blocks_last(weight_SBW), blocks_last(weights_SBW), Levels(63)).view(-1, 16)
    factor_S1 = (signed_largest(scale_SB, 1) / -128).half()
    whole_S1 = factor_S1.float()
    codes_SB = (scale_SB / torch.where(whole_S1 != 0, whole_S1, torch.inf)).round().clamp(-128, 127)
    scale_SB1 = (whole_S1 * codes_SB).unsqueeze(2)
    levels = (weight_SBW / torch.where(scale_SB1 != 0, scale_SB1, torch.inf)).round().clamp(-32, 31) + 32
    quarters_S22W = levels.byte().reshape(-1, 2, 4, 32)  # halves of 128 weights, their quarters of 32
    low = quarters_S22W & 15
    high = ((quarters_S22W >> 4) << _shifts(low, 4, 2)).sum(2, dtype=torch.uint8)
    low = low[:, :, :2] | (low[:, :, 2:] << 4)
    signed = codes_SB.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), signed, factor_S1.view(torch.uint8)], 1)


def _q8_0(weight_RI: torch.Tensor) -> torch.Tensor:
    """Rounds half away from zero, as C's roundf does."""
    blocks = weight_RI.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(scale > 0, 1 / scale, 0)
    whole = scaled.trunc()
    codes = whole + (scaled - whole).mul_(2).trunc_()
    return torch.cat([scale.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], 1)
