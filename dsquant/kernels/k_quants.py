"""Q4_K, Q5_K, Q6_K and Q8_0 in PyTorch: the reference of the Triton kernels, and the CPU's way without ggml.

The searches are ggml's: some thirty candidate scales for each block, the best one by weighted least squares, then
scales of 6 or 8 bits for each super-block. A candidate's error follows from three sums over its codes, in units of the
block's range and around its mean, so no second pass over the weights is needed and nothing cancels. Two things differ
and leave less error: 6-bit scales are judged as float16 will hold them, and offsets are fitted to those stored scales.
Reference: `quantize_q4_K`, `quantize_q5_K`, `quantize_q6_K` and `quantize_row_q8_0_ref` in ggml-quants.c,
https://github.com/ggml-org/ggml

Shape legend: R rows, I columns, S super-blocks of 256 weights, B blocks of a super-block, W weights of a block,
N blocks.
"""

from dataclasses import dataclass

import torch

SUPER_BLOCK = 256
# type -> bytes of a super-block; Q8_0 has plain blocks of 32 only
ROW_BLOCKS = {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_0": (32, 34)}
# Candidates divide a block's range by the number of steps plus each of these.
AFFINE_FIRST, AFFINE_STEP, AFFINE_TRIES = -0.9, 0.05, 37
# from the middle outwards: where all fit alike, a range of powers of two keeps its exact scale
SYMMETRIC_STEP, SYMMETRIC_TRIES = 0.1, 19
SCALE_FIRST, SCALE_STEP, SCALE_TRIES = -20.0, 1.0, 21
LARGEST_SCALE = 63
LEAST = 1e-30
# How far a candidate must surpass one before it: rounding of the sums decides nothing.
BETTER = 1 + 1e-6
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


@dataclass(frozen=True)
class AffineScales:
    """The stored scales of a super-block of Q4_K or Q5_K: scale * code - offset, each a factor times 6 bits."""

    scale_S1: torch.Tensor
    """float16 [S, 1]."""
    scale_codes_SB: torch.Tensor
    """Whole numbers in [0, 63], float32 [S, 8]."""
    offset_S1: torch.Tensor
    offset_codes_SB: torch.Tensor

    def header(self) -> torch.Tensor:
        """Packs the 16 bytes before the codes, uint8 [S, 16]."""
        low, high = self.scale_codes_SB.byte().chunk(2, 1)
        low_offsets, high_offsets = self.offset_codes_SB.byte().chunk(2, 1)
        packed = [
            torch.cat([self.scale_S1, self.offset_S1], 1).view(torch.uint8),
            low | ((high >> 4) << 6),
            low_offsets | ((high_offsets >> 4) << 6),
            (high & 15) | ((high_offsets & 15) << 4),
        ]
        return torch.cat(packed, 1)


def affine_scales(weight_SW: torch.Tensor, importance_SW: torch.Tensor, steps: int) -> AffineScales:
    """Searches the scales of super-blocks, float32 [S, 256], as they are stored; `steps` is the largest code.

    `importance_SW`, positive, weighs each squared error.
    """
    spread_S1 = 2 * weight_SW.square().mean(1, keepdim=True)
    weights_SBW = (importance_SW * (spread_S1 + weight_SW.square()).sqrt()).unflatten(1, (8, 32))
    shares_SB = weights_SBW.sum(2)
    found = _affine_search(_blocks_last(weight_SW.unflatten(1, (8, 32))), _blocks_last(weights_SBW), steps)
    scale_SB, code_SB, mean_SB = (values_N.view_as(shares_SB) for values_N in found)
    scale_S1, scale_codes_SB = _scale_search(scale_SB, shares_SB)
    scale_SB = scale_S1.float() * scale_codes_SB
    # The offset that fits the scale as it is stored. Where the line would start above zero it starts at zero.
    offset_S1, offset_codes_SB = _scale_search((scale_SB * code_SB - mean_SB).clamp_(min=0), shares_SB)
    return AffineScales(scale_S1, scale_codes_SB, offset_S1, offset_codes_SB)


def _affine(weight_SW: torch.Tensor, importance_SW: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 bytes of scales before the codes, and the codes."""
    found = affine_scales(weight_SW, importance_SW, steps)
    scale_SB1 = (found.scale_S1.float() * found.scale_codes_SB).unsqueeze(2)
    offset_SB1 = (found.offset_S1.float() * found.offset_codes_SB).unsqueeze(2)
    shifted_SBW = weight_SW.unflatten(1, (8, 32)) + offset_SB1
    codes_SBW = (shifted_SBW / torch.where(scale_SB1 > 0, scale_SB1, torch.inf)).round().clamp(0, steps)
    return found.header(), codes_SBW.byte()


def _blocks_last(values_SBW: torch.Tensor) -> torch.Tensor:
    """[W, N]: sums over a block are then sums of vectors, several times as fast on a CPU."""
    return values_SBW.flatten(0, 1).T.contiguous()


def _affine_search(weight_WN: torch.Tensor, weights_WN: torch.Tensor, steps: int) -> tuple[torch.Tensor, ...]:
    """Each block's scale, so that scale * code - offset has the least weighted squared error, mean code and mean."""
    low_N = weight_WN.amin(0).clamp_(max=0)
    range_N = weight_WN.amax(0) - low_N
    safe_range_N = range_N.clamp(min=LEAST)
    unit_WN = (weight_WN - low_N) / safe_range_N
    weights_WN = weights_WN / weights_WN.sum(0).clamp_(min=LEAST)
    mean_N = (weights_WN * unit_WN).sum(0)
    centred_WN = unit_WN - mean_N
    # A line that would start above zero starts at zero: offsets are not negative.
    above_N = (mean_N + low_N / safe_range_N).clamp_(min=0)
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


def _scale_search(values_SB: torch.Tensor, shares_SB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float16 factor of each super-block and 6-bit codes, so that their products are near values that are ≥ 0.

    Candidates are judged by the factor that is stored: small weights have factors that float16 holds with few bits.
    """
    largest_S1 = values_SB.amax(1, keepdim=True)
    safe_largest_S1 = largest_S1.clamp(min=LEAST)
    unit_SB = values_SB / safe_largest_S1
    shares_SB = shares_SB / shares_SB.sum(1, keepdim=True).clamp(min=LEAST)
    best = torch.full_like(largest_S1, torch.inf)
    best_factor, best_codes = torch.zeros_like(largest_S1).half(), torch.zeros_like(unit_SB)
    for number in range(SCALE_TRIES):
        codes_SB = (unit_SB * (LARGEST_SCALE + SCALE_FIRST + SCALE_STEP * number)).round_().clamp_(max=LARGEST_SCALE)
        product = (shares_SB * codes_SB * unit_SB).sum(1, keepdim=True)
        square = (shares_SB * codes_SB.square()).sum(1, keepdim=True).clamp(min=LEAST)
        factor = (product / square * largest_S1).half()
        stored = factor.float() / safe_largest_S1
        codes_SB = (unit_SB / stored.clamp(min=LEAST)).clamp_(max=LARGEST_SCALE).round_()
        error = (shares_SB * (unit_SB - stored * codes_SB).square()).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_factor = torch.where(better, factor, best_factor)
        best_codes = torch.where(better, codes_SB, best_codes)
    return best_factor, best_codes


def _q6_k(weight_SW: torch.Tensor, importance_SW: torch.Tensor) -> torch.Tensor:
    weight_SBW, weights_SBW = weight_SW.unflatten(1, (16, 16)), importance_SW.unflatten(1, (16, 16))
    scale_SB = _symmetric_search(_blocks_last(weight_SBW), _blocks_last(weights_SBW)).view(-1, 16)
    factor_S1 = (_signed_largest(scale_SB, 1) / -128).half()
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


def _signed_largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The value furthest from zero along a dimension, which stays."""
    largest, smallest = values.amax(dim, keepdim=True), values.amin(dim, keepdim=True)
    return torch.where(largest >= -smallest, largest, smallest)


def _symmetric_search(weight_WN: torch.Tensor, weights_WN: torch.Tensor) -> torch.Tensor:
    """Scale of each block, so that scale * code has the least weighted squared error."""
    extreme_1N = _signed_largest(weight_WN, 0)
    unit_WN = weight_WN / torch.where(extreme_1N != 0, -extreme_1N, torch.inf)
    weights_WN = weights_WN / weights_WN.sum(0).clamp_(min=LEAST)
    best_N, scale_N = torch.zeros_like(extreme_1N[0]), torch.zeros_like(extreme_1N[0])
    codes_WN, weighted_WN = torch.empty_like(unit_WN), torch.empty_like(unit_WN)
    for number in range(SYMMETRIC_TRIES):
        distance = SYMMETRIC_STEP * ((number + 1) // 2) * (1 - 2 * (number % 2))
        torch.mul(unit_WN, 32 + distance, out=codes_WN).round_().clamp_(-32, 31)
        torch.mul(weights_WN, codes_WN, out=weighted_WN)
        square_N = codes_WN.mul_(weighted_WN).sum(0).clamp_(min=LEAST)
        product_N = weighted_WN.mul_(unit_WN).sum(0)
        scale = product_N / square_N
        better = scale * product_N > best_N * BETTER
        for kept, found in ((best_N, scale * product_N), (scale_N, scale)):
            torch.where(better, found, kept, out=kept)
    return scale_N * -extreme_1N[0]


def _q8_0(weight_RI: torch.Tensor) -> torch.Tensor:
    """Rounds half away from zero, as C's roundf does."""
    blocks = weight_RI.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(scale > 0, 1 / scale, 0)
    whole = scaled.trunc()
    codes = whole + (scaled - whole).mul_(2).trunc_()
    return torch.cat([scale.half().view(torch.uint8), codes.to(torch.int8).view(torch.uint8)], 1)
