"""Q4_K, Q5_K, Q6_K and Q8_0 on a GPU: the searches of `k_quants`, blocks in registers, bytes written once.

Some 300 instructions for each weight make the searches bound by arithmetic, not by memory: a program keeps a few
super-blocks in registers through all candidates and stores nothing but the packed result.

Shape legend: S super-blocks of a program, B blocks of a super-block, N = S * B blocks, W weights of a block.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels import k_quants, scale_candidates
from dsquant.kernels.scale_search_triton import affine_lines, furthest, rounded
from dsquant.kernels.values import SUPER_BLOCK

SYMMETRIC_STEP = tl.constexpr(scale_candidates.SYMMETRIC_STEP)
SYMMETRIC_TRIES = tl.constexpr(scale_candidates.SYMMETRIC_TRIES)
SCALE_FIRST = tl.constexpr(scale_candidates.SCALE_FIRST)
SCALE_STEP = tl.constexpr(scale_candidates.SCALE_STEP)
SCALE_TRIES = tl.constexpr(scale_candidates.SCALE_TRIES)
LARGEST_SCALE = tl.constexpr(scale_candidates.LARGEST_SCALE)
LEAST = tl.constexpr(scale_candidates.LEAST)
BETTER = tl.constexpr(scale_candidates.BETTER)
# Super-blocks of a program of one warp, 16 weights to a thread: no sum then waits for another warp. Measured on an
# H100: Q4_K at 100 GB/s of float32, with 8 super-blocks and four warps at 71.
SUPER_BLOCKS = 2
WARPS = 1


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """`k_quants.quantize` on the rows' GPU."""
    block, size = k_quants.ROW_BLOCKS[type_name]
    num_rows, num_columns = rows_RI.shape
    rows_RI = rows_RI.float().contiguous()
    importance_I = importance_I.to(rows_RI).contiguous()
    stored_RN = torch.empty(num_rows, num_columns // block * size, dtype=torch.uint8, device=rows_RI.device)
    num_supers = triton.cdiv(rows_RI.numel(), SUPER_BLOCK)
    grid = (triton.cdiv(num_supers, SUPER_BLOCKS),)
    # Said outright: the default, and with it the last bits, changes between releases of Triton.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    if type_name == "Q8_0":
        _q8_0[grid](rows_RI, stored_RN, rows_RI.numel() // 32, SUPER_BLOCKS * 8, **options)
    elif type_name == "Q6_K":
        _q6_k[grid](rows_RI, importance_I, stored_RN, num_columns, num_supers, SUPER_BLOCKS, **options)
    else:
        high = type_name == "Q5_K"
        _affine[grid](rows_RI, importance_I, stored_RN, num_columns, num_supers, SUPER_BLOCKS, high, **options)
    return stored_RN


@triton.jit
def _load_blocks(rows, importance, num_columns, num_supers, S: tl.constexpr, B: tl.constexpr, W: tl.constexpr):
    """A program's weights and their importances, [N, W]; past the end, zeros and ones."""
    blocks_N = tl.program_id(0).to(tl.int64) * (S * B) + tl.arange(0, S * B)
    inside_N1 = (blocks_N < num_supers.to(tl.int64) * B)[:, None]
    lanes_1W = tl.arange(0, W)[None, :]
    weight_NW = tl.load(rows + blocks_N[:, None] * W + lanes_1W, mask=inside_N1, other=0.0)
    columns_N1 = ((blocks_N * W) % num_columns)[:, None]
    return weight_NW, tl.load(importance + columns_N1 + lanes_1W, mask=inside_N1, other=1.0)


@triton.jit
def _affine(rows, importance, stored, num_columns, num_supers, S: tl.constexpr, HIGH: tl.constexpr):
    """Q4_K; Q5_K with HIGH."""
    N: tl.constexpr = S * 8
    STEPS: tl.constexpr = 31 if HIGH else 15
    weight_NW, importance_NW = _load_blocks(rows, importance, num_columns, num_supers, S, 8, 32)
    squares_S = tl.sum(tl.reshape(tl.sum(weight_NW * weight_NW, 1), [S, 8]), 1)
    spread_N = tl.reshape(tl.broadcast_to(squares_S[:, None], [S, 8]), [N]) * (2 / 256)
    weights_NW = importance_NW * tl.sqrt(spread_N[:, None] + weight_NW * weight_NW)
    shares_N = tl.sum(weights_NW, 1)
    weights_NW = weights_NW / tl.maximum(shares_N, LEAST)[:, None]
    scale_N, code_N, mean_N = affine_lines(weight_NW, weights_NW, N, STEPS, False)
    shares_SB = tl.reshape(shares_N, [S, 8])
    shares_SB = shares_SB / tl.maximum(tl.sum(shares_SB, 1), LEAST)[:, None]
    scale_S, scale_codes_SB = _scale_search(tl.reshape(scale_N, [S, 8]), shares_SB, S)
    scale_N = tl.reshape(scale_S.to(tl.float32)[:, None] * scale_codes_SB, [N])
    offset_SB = tl.reshape(tl.maximum(scale_N * code_N - mean_N, 0.0), [S, 8])
    offset_S, offset_codes_SB = _scale_search(offset_SB, shares_SB, S)
    offset_N = tl.reshape(offset_S.to(tl.float32)[:, None] * offset_codes_SB, [N])
    inverse_N = tl.where(scale_N > 0, 1 / tl.where(scale_N > 0, scale_N, 1.0), 0.0)
    codes_NW = rounded((weight_NW + offset_N[:, None]) * inverse_N[:, None])
    codes_NW = tl.minimum(tl.maximum(codes_NW, 0.0), STEPS).to(tl.int32)

    supers_S = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    inside_S = supers_S < num_supers
    super_S = stored + supers_S * (176 if HIGH else 144)
    halves_S = super_S.to(tl.pointer_type(tl.float16))
    tl.store(halves_S, scale_S, mask=inside_S)
    tl.store(halves_S + 1, offset_S, mask=inside_S)
    _store_six_bits(super_S + 4, scale_codes_SB.to(tl.int32), offset_codes_SB.to(tl.int32), inside_S, S)
    inside_S1, lanes_1W = inside_S[:, None], tl.arange(0, 32)[None, :]
    if HIGH:
        bits_SBW = tl.reshape(codes_NW >> 4, [S, 8, 32]) << tl.arange(0, 8)[None, :, None]
        tl.store(super_S[:, None] + 16 + lanes_1W, tl.sum(bits_SBW, 1).to(tl.uint8), mask=inside_S1)
        codes_NW = codes_NW & 15
    halves = tl.reshape(codes_NW, [S * 4, 2, 32]) << (4 * tl.arange(0, 2))[None, :, None]
    packed = tl.reshape(tl.sum(halves, 1), [S, 128]).to(tl.uint8)
    start: tl.constexpr = 48 if HIGH else 16
    tl.store(super_S[:, None] + start + tl.arange(0, 128)[None, :], packed, mask=inside_S1)


@triton.jit
def _scale_search(values_SB, shares_SB, S: tl.constexpr):
    """As `scale_search.scale_search`; the shares sum to one."""
    largest_S = tl.max(values_SB, 1)
    safe_largest_S = tl.maximum(largest_S, LEAST)
    unit_SB = values_SB / safe_largest_S[:, None]
    best_S = tl.full([S], float("inf"), tl.float32)
    best_factor_S = tl.zeros([S], tl.float16)
    best_codes_SB = tl.zeros_like(unit_SB)
    for number in range(SCALE_TRIES):
        codes_SB = rounded(unit_SB * (LARGEST_SCALE + SCALE_FIRST + SCALE_STEP * number))
        codes_SB = tl.minimum(codes_SB, LARGEST_SCALE)
        weighted_SB = shares_SB * codes_SB
        square_S = tl.maximum(tl.sum(weighted_SB * codes_SB, 1), LEAST)
        factor_S = (tl.sum(weighted_SB * unit_SB, 1) / square_S * largest_S).to(tl.float16)
        stored_S = factor_S.to(tl.float32) / safe_largest_S
        inverse_S = 1 / tl.maximum(stored_S, LEAST)
        codes_SB = rounded(tl.minimum(unit_SB * inverse_S[:, None], LARGEST_SCALE))
        rest_SB = unit_SB - stored_S[:, None] * codes_SB
        error_S = tl.sum(shares_SB * rest_SB * rest_SB, 1)
        better = error_S < best_S
        best_S = tl.where(better, error_S, best_S)
        best_factor_S = tl.where(better, factor_S, best_factor_S)
        best_codes_SB = tl.where(better[:, None], codes_SB, best_codes_SB)
    return best_factor_S, best_codes_SB


@triton.jit
def _store_six_bits(place_S, scales_SB, offsets_SB, inside_S, S: tl.constexpr):
    """Packs eight scales and eight offsets of six bits into 12 bytes."""
    second_1H1 = tl.arange(0, 2)[None, :, None]
    scales_SH4, offsets_SH4 = tl.reshape(scales_SB, [S, 2, 4]), tl.reshape(offsets_SB, [S, 2, 4])
    # the first four take six bits of a byte of their own and lend its other two to the last four
    scales = tl.sum(tl.where(second_1H1 == 1, (scales_SH4 >> 4) << 6, scales_SH4), 1)
    offsets = tl.sum(tl.where(second_1H1 == 1, (offsets_SH4 >> 4) << 6, offsets_SH4), 1)
    rest = tl.sum(tl.where(second_1H1 == 1, (scales_SH4 & 15) | ((offsets_SH4 & 15) << 4), 0), 1)
    bytes_S4 = place_S[:, None] + tl.arange(0, 4)[None, :]
    tl.store(bytes_S4, scales.to(tl.uint8), mask=inside_S[:, None])
    tl.store(bytes_S4 + 4, offsets.to(tl.uint8), mask=inside_S[:, None])
    tl.store(bytes_S4 + 8, rest.to(tl.uint8), mask=inside_S[:, None])


@triton.jit
def _q6_k(rows, importance, stored, num_columns, num_supers, S: tl.constexpr):
    N: tl.constexpr = S * 16
    weight_NW, weights_NW = _load_blocks(rows, importance, num_columns, num_supers, S, 16, 16)
    weights_NW = weights_NW / tl.maximum(tl.sum(weights_NW, 1), LEAST)[:, None]
    scale_SB = tl.reshape(_symmetric_search(weight_NW, weights_NW, N), [S, 16])
    factor_S = (furthest(tl.max(scale_SB, 1), tl.min(scale_SB, 1)) / -128).to(tl.float16)
    whole_S = factor_S.to(tl.float32)
    inverse_S = tl.where(whole_S != 0, 1 / tl.where(whole_S != 0, whole_S, 1.0), 0.0)
    scale_codes_SB = tl.minimum(tl.maximum(rounded(scale_SB * inverse_S[:, None]), -128.0), 127.0)
    scale_N = tl.reshape(whole_S[:, None] * scale_codes_SB, [N])
    inverse_N = tl.where(scale_N != 0, 1 / tl.where(scale_N != 0, scale_N, 1.0), 0.0)
    codes_NW = tl.minimum(tl.maximum(rounded(weight_NW * inverse_N[:, None]), -32.0), 31.0).to(tl.int32) + 32

    supers_S = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    inside_S = supers_S < num_supers
    super_S, inside_S1 = stored + supers_S * 210, inside_S[:, None]
    # halves of 128 weights, each two pairs of quarters of 32
    quarters = tl.reshape(codes_NW, [S * 2, 2, 64])
    low = tl.sum((quarters & 15) << (4 * tl.arange(0, 2))[None, :, None], 1)
    tl.store(super_S[:, None] + tl.arange(0, 128)[None, :], tl.reshape(low, [S, 128]).to(tl.uint8), mask=inside_S1)
    quarters = tl.reshape(codes_NW, [S * 2, 4, 32])
    high = tl.sum((quarters >> 4) << (2 * tl.arange(0, 4))[None, :, None], 1)
    tl.store(super_S[:, None] + 128 + tl.arange(0, 64)[None, :], tl.reshape(high, [S, 64]).to(tl.uint8), mask=inside_S1)
    scale_bytes = scale_codes_SB.to(tl.int8).to(tl.uint8, bitcast=True)
    tl.store(super_S[:, None] + 192 + tl.arange(0, 16)[None, :], scale_bytes, mask=inside_S1)
    tl.store((super_S + 208).to(tl.pointer_type(tl.float16)), factor_S, mask=inside_S)


@triton.jit
def _symmetric_search(weight_NW, weights_NW, N: tl.constexpr):
    """As `scale_search.symmetric_search`; the weights of the errors sum to one."""
    extreme_N = furthest(tl.max(weight_NW, 1), tl.min(weight_NW, 1))
    inverse_N = tl.where(extreme_N != 0, -1 / tl.where(extreme_N != 0, extreme_N, 1.0), 0.0)
    unit_NW = weight_NW * inverse_N[:, None]
    best_N = tl.zeros([N], tl.float32)
    scale_N = tl.zeros([N], tl.float32)
    for number in range(SYMMETRIC_TRIES):
        distance = SYMMETRIC_STEP * ((number + 1) // 2) * (1 - 2 * (number % 2))
        codes_NW = rounded(unit_NW * (32 + distance))
        codes_NW = tl.minimum(tl.maximum(codes_NW, -32.0), 31.0)
        weighted_NW = weights_NW * codes_NW
        product_N = tl.sum(weighted_NW * unit_NW, 1)
        scale = product_N / tl.maximum(tl.sum(weighted_NW * codes_NW, 1), LEAST)
        better = scale * product_N > best_N * BETTER
        best_N = tl.where(better, scale * product_N, best_N)
        scale_N = tl.where(better, scale, scale_N)
    return scale_N * -extreme_N


@triton.jit
def _q8_0(rows, stored, num_blocks, N: tl.constexpr):
    """Divides and rounds exactly as C does: the bytes are ggml's."""
    blocks_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside_N, lanes_1W = blocks_N < num_blocks, tl.arange(0, 32)[None, :]
    weight_NW = tl.load(rows + blocks_N[:, None] * 32 + lanes_1W, mask=inside_N[:, None], other=0.0)
    scale_N = tl.div_rn(tl.max(tl.abs(weight_NW), 1), 127.0)
    inverse_N = tl.where(scale_N > 0, tl.div_rn(1.0, tl.where(scale_N > 0, scale_N, 1.0)), 0.0)
    scaled_NW = weight_NW * inverse_N[:, None]
    size_NW = tl.abs(scaled_NW)
    whole_NW = tl.floor(size_NW)
    whole_NW += tl.where(size_NW - whole_NW >= 0.5, 1.0, 0.0)
    codes_NW = tl.where(scaled_NW < 0, -whole_NW, whole_NW).to(tl.int8).to(tl.uint8, bitcast=True)
    block_N = stored + blocks_N * 34
    tl.store(block_N.to(tl.pointer_type(tl.float16)), scale_N.to(tl.float16), mask=inside_N)
    tl.store(block_N[:, None] + 2 + lanes_1W, codes_NW, mask=inside_N[:, None])
