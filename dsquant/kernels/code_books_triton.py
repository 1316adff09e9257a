"""`code_book_search` on a GPU: a program keeps a super-block's sums in registers while the points pass by.

Shape legend: T tries (candidate scales, then levels), V vectors of a super-block, B blocks of it, P weights of a
vector, K points that are looked at together, F candidate factors.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels import code_book_search, code_books
from dsquant.kernels.values import SUPER_BLOCK

# Super-blocks that are searched together.
SUPERS_AT_ONCE = 2**16
CANDIDATES = tl.constexpr(code_book_search.CANDIDATES)
FACTOR_FIRST = tl.constexpr(code_book_search.FACTOR_FIRST)
FACTOR_STEP = tl.constexpr(code_book_search.FACTOR_STEP)
FACTOR_TRIES = tl.constexpr(code_book_search.FACTOR_TRIES)
LEAST = tl.constexpr(code_books.LEAST)
# Adding and subtracting it rounds a float32 to the nearest integer, halves to even.
ROUNDER = tl.constexpr(1.5 * 2**23)
# How a vector's signs are stored: all of them, in the points, or an even number of minus signs by one or two vectors.
FREE, EVEN, EVEN_PAIRS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Points that are looked at together, by the weights of a vector; measured on an H200 with one to four warps.
POINTS_TOGETHER = {8: 4, 4: 2}
WARPS = 1


def quantize(rows_RI: torch.Tensor, type_name: str, importance_I: torch.Tensor) -> torch.Tensor:
    """`code_book_search.quantize` on a GPU, on whose memory the result is."""
    return code_book_search.quantize_with(search, rows_RI, type_name, importance_I, SUPERS_AT_ONCE)


def search(vectors: code_books.Vectors) -> code_books.Chosen:
    """Chooses scales and points.

    Args:
        vectors: of whole super-blocks, on a GPU.

    Returns:
        What to store.
    """
    kind, points_AKP = vectors.kind, vectors.points_AKP.contiguous()
    alternatives, num_points, width = points_AKP.shape
    num_supers, per_super = vectors.num_supers, SUPER_BLOCK // width
    num_blocks = SUPER_BLOCK // kind.block
    weight, importance = vectors.weight_NGP.contiguous(), vectors.importance_NGP.contiguous()
    values = weight if kind.signs == "delta" else weight.abs()
    device = weight.device
    factor_S = torch.empty(num_supers, dtype=torch.float16, device=device)
    level_SB, alternative_SB = torch.empty(2, num_supers, num_blocks, dtype=torch.int32, device=device)
    index_SV, flipped_SV = torch.empty(2, num_supers, per_super, dtype=torch.int32, device=device)
    signs = {"free": FREE, "delta": FREE, "even": EVEN if width == 8 else EVEN_PAIRS}[kind.signs]
    first, last = kind.candidates
    _search[(num_supers,)](
        values, importance, vectors.odd_NG.to(torch.int32).contiguous(), points_AKP,
        factor_S, level_SB, index_SV, flipped_SV, alternative_SB,
        points_AKP.abs().amax(), first, (last - first) / (code_book_search.CANDIDATES - 1),
        num_points, alternatives, per_super, num_blocks, width, kind.levels, signs.value, POINTS_TOGETHER[width],
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    shape = vectors.weight_NGP.shape[:2]
    index_NG, flipped_NG = index_SV.view(shape).long(), flipped_SV.view(shape).bool()
    negative_NGP = code_books.signs_of(vectors, index_NG, flipped_NG)
    return code_books.Chosen(
        factor_S, level_SB.flatten().long(), index_NG, negative_NGP, alternative_SB.flatten().long()
    )


@triton.jit
def _rounded(values):
    return (values + ROUNDER) - ROUNDER


@triton.jit
def _least_errors(
    values_V, importance_V, odd_V, points, scale_TV, num_points: tl.constexpr, P: tl.constexpr, FLIP: tl.constexpr,
    T: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The least error of each vector over all points, and its point; with FLIP where `odd_V`, one sign given up."""
    # Each of K lanes keeps its own least error: lanes are compared once, at the end.
    least_TVK, start_TVK = tl.full([T, V, K], float("inf"), tl.float32), tl.zeros([T, V, K], tl.int32)
    scale_TV1 = scale_TV[:, :, None]
    for start in range(0, num_points, K):
        points_K = points + (start + tl.arange(0, K)) * P
        product_VK, energy_VK = tl.zeros([V, K], tl.float32), tl.zeros([V, K], tl.float32)
        given_up_VK = tl.full([V, K], float("inf"), tl.float32)
        for lane in tl.static_range(P):
            weights_V = tl.load(importance_V + lane)
            weighted_V = weights_V * tl.load(values_V + lane)
            point_K = tl.load(points_K + lane)
            lost_VK = weighted_V[:, None] * point_K[None, :]
            product_VK += lost_VK
            energy_VK += weights_V[:, None] * (point_K * point_K)[None, :]
            if FLIP:
                given_up_VK = tl.minimum(given_up_VK, lost_VK)
        if FLIP:
            product_VK = tl.where(odd_V[:, None], product_VK - 2 * given_up_VK, product_VK)
        errors_TVK = scale_TV1 * (scale_TV1 * energy_VK[None, :, :] - 2 * product_VK[None, :, :])
        better_TVK = errors_TVK < least_TVK
        least_TVK = tl.where(better_TVK, errors_TVK, least_TVK)
        start_TVK = tl.where(better_TVK, start, start_TVK)
    error_TV, lane_TV = tl.min(least_TVK, 2, return_indices=True)
    is_best_TVK = tl.arange(0, K)[None, None, :] == lane_TV[:, :, None]
    return error_TV, lane_TV + tl.sum(tl.where(is_best_TVK, start_TVK, 0), 2)


@triton.jit
def _sums(
    values_V, importance_V, points, index_TV, flipped_TV, P: tl.constexpr, FLIP: tl.constexpr,
    T: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The product and the energy of chosen points."""
    product_TV, energy_TV = tl.zeros([T, V], tl.float32), tl.zeros([T, V], tl.float32)
    given_up_TV = tl.full([T, V], float("inf"), tl.float32)
    for lane in tl.static_range(P):
        weights_V = tl.load(importance_V + lane)
        point_TV = tl.load(points + index_TV * P + lane)
        lost_TV = (weights_V * tl.load(values_V + lane))[None, :] * point_TV
        product_TV += lost_TV
        energy_TV += weights_V[None, :] * point_TV * point_TV
        if FLIP:
            given_up_TV = tl.minimum(given_up_TV, lost_TV)
    if FLIP:
        product_TV = tl.where(flipped_TV, product_TV - 2 * given_up_TV, product_TV)
    return product_TV, energy_TV


@triton.jit
def _of_blocks(values_TV, T: tl.constexpr, B: tl.constexpr, G: tl.constexpr):
    """Sums over the vectors of each block, [T, B]."""
    return tl.sum(tl.reshape(values_TV, [T, B, G]), 2)


@triton.jit
def _to_vectors(values_TB, T: tl.constexpr, B: tl.constexpr, G: tl.constexpr):
    """Each block's value for all its vectors, [T, V]."""
    return tl.reshape(tl.broadcast_to(values_TB[:, :, None], [T, B, G]), [T, B * G])


@triton.jit
def nearest(
    values_V, importance_V, odd_V, points, scale_TB, num_points: tl.constexpr, ALTERNATIVES: tl.constexpr,
    SIGNS: tl.constexpr, P: tl.constexpr, T: tl.constexpr, B: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The points of least error under each block's tried scales: error, product, energy [T, B], the alternative of each
    block, and index and flip of each vector [T, V]."""
    V: tl.constexpr = B * G
    scale_TV = _to_vectors(scale_TB, T, B, G)
    none_V = tl.zeros([V], tl.int1)
    error_TV, index_TV = _least_errors(
        values_V, importance_V, odd_V, points, scale_TV, num_points, P, SIGNS == EVEN, T, V, K
    )
    flipped_TV = tl.broadcast_to((odd_V if SIGNS == EVEN else none_V)[None, :], [T, V])
    if SIGNS == EVEN_PAIRS:  # the sign is given up in one of two vectors, where that costs less
        found_TV, place_TV = _least_errors(
            values_V, importance_V, odd_V, points, scale_TV, num_points, P, True, T, V, K
        )
        cost_TV2 = tl.reshape(found_TV - error_TV, [T, V // 2, 2])
        first_T, second_T = tl.split(cost_TV2)
        flip_first = first_T <= second_T
        flipped_TV = tl.reshape(tl.join(flip_first, flip_first == 0), [T, V]) & (odd_V[None, :])
        error_TV = tl.where(flipped_TV, found_TV, error_TV)
        index_TV = tl.where(flipped_TV, place_TV, index_TV)
    error_TB = _of_blocks(error_TV, T, B, G)
    product_TV, energy_TV = _sums(values_V, importance_V, points, index_TV, flipped_TV, P, SIGNS != FREE, T, V)
    product_TB, energy_TB = _of_blocks(product_TV, T, B, G), _of_blocks(energy_TV, T, B, G)
    alternative_TB = tl.zeros([T, B], tl.int32)
    for alternative in tl.static_range(1, ALTERNATIVES):
        others = points + alternative * num_points * P
        other_TV, place_TV = _least_errors(
            values_V, importance_V, odd_V, others, scale_TV, num_points, P, False, T, V, K
        )
        found_TB = _of_blocks(other_TV, T, B, G)
        better_TB = found_TB < error_TB
        better_TV = _to_vectors(better_TB, T, B, G)
        product_TV, energy_TV = _sums(values_V, importance_V, others, place_TV, flipped_TV, P, False, T, V)
        error_TB = tl.where(better_TB, found_TB, error_TB)
        product_TB = tl.where(better_TB, _of_blocks(product_TV, T, B, G), product_TB)
        energy_TB = tl.where(better_TB, _of_blocks(energy_TV, T, B, G), energy_TB)
        index_TV = tl.where(better_TV, place_TV, index_TV)
        alternative_TB = tl.where(better_TB, alternative, alternative_TB)
    return error_TB, product_TB, energy_TB, alternative_TB, index_TV, flipped_TV


@triton.jit
def _picked(values_TB, best_B, T: tl.constexpr):
    """The row of each column that `best_B` names, [B]; of values of which no other is taken."""
    chosen_TB = tl.arange(0, T)[:, None] == best_B[None, :]
    return tl.sum(tl.where(chosen_TB, values_TB, 0), 0)


@triton.jit
def _levels(scale_B, energy_B, LEVELS: tl.constexpr, B: tl.constexpr):
    """The super-block's factor, float16, and each block's level, float32 [B]."""
    whole = tl.max(scale_B, 0) / (2 * LEVELS - 1)
    tried_F = (whole * (FACTOR_FIRST + FACTOR_STEP * tl.arange(0, FACTOR_TRIES))).to(tl.float16)
    tried_F1 = tried_F.to(tl.float32)[:, None]
    steps_FB = scale_B[None, :] / tl.maximum(tried_F1, LEAST)
    levels_FB = tl.minimum(tl.maximum(_rounded((steps_FB - 1) / 2), 0.0), LEVELS - 1)
    missed_FB = tried_F1 * (2 * levels_FB + 1) - scale_B[None, :]
    best = tl.argmin(tl.sum(energy_B[None, :] * missed_FB * missed_FB, 1), 0)
    is_best_F = tl.arange(0, FACTOR_TRIES) == best
    factor = tl.sum(tl.where(is_best_F, tried_F.to(tl.float32), 0.0), 0)
    return factor, tl.sum(tl.where(is_best_F[:, None], levels_FB, 0.0), 0)


@triton.jit
def _search(
    values, importance, odd, points, factors, levels, indices, flips, alternatives,
    largest_point, first, step, num_points: tl.constexpr, ALTERNATIVES: tl.constexpr, V: tl.constexpr, B: tl.constexpr,
    P: tl.constexpr, LEVELS: tl.constexpr, SIGNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = V // B
    super_block = tl.program_id(0).to(tl.int64)
    lanes_V = tl.arange(0, V)
    values_V = values + super_block * 256 + lanes_V * P
    importance_V = importance + super_block * 256 + lanes_V * P
    odd_V = tl.load(odd + super_block * V + lanes_V) != 0
    weights = tl.load(values + super_block * 256 + tl.arange(0, 256))
    reaching_B = tl.max(tl.reshape(tl.abs(weights), [B, 256 // B]), 1) / tl.load(largest_point)
    tries_T = tl.arange(0, CANDIDATES)
    scale_TB = reaching_B[None, :] * (first + step * tries_T)[:, None]
    _error_TB, product_TB, energy_TB, _alternative_TB, _index_TV, _flipped_TV = nearest(
        values_V, importance_V, odd_V, points, scale_TB, num_points, ALTERNATIVES, SIGNS, P, CANDIDATES, B, G, K
    )
    fitted_TB = tl.maximum(product_TB / tl.maximum(energy_TB, LEAST), 0.0)
    gain_TB = fitted_TB * product_TB
    best_B = tl.argmax(gain_TB, 0)
    scale_B, gain_B = _picked(fitted_TB, best_B, CANDIDATES), tl.max(gain_TB, 0)
    energy_B = _picked(energy_TB, best_B, CANDIDATES)
    _again_1B, product_1B, again_energy_1B, _alternative_1B, _index_1V, _flipped_1V = nearest(
        values_V, importance_V, odd_V, points, scale_B[None, :], num_points, ALTERNATIVES, SIGNS, P, 1, B, G, K
    )
    fitted_1B = tl.maximum(product_1B / tl.maximum(again_energy_1B, LEAST), 0.0)
    better_B = tl.sum(fitted_1B * product_1B, 0) > gain_B
    scale_B = tl.where(better_B, tl.sum(fitted_1B, 0), scale_B)
    energy_B = tl.where(better_B, tl.sum(again_energy_1B, 0), energy_B)
    factor, level_B = _levels(scale_B, energy_B, LEVELS, B)
    # The level, the one below it, the one above it, and the level again.
    steps_4 = tl.arange(0, 4)
    steps_41 = tl.where(steps_4 == 1, -1.0, tl.where(steps_4 == 2, 1.0, 0.0))[:, None]
    level_4B = tl.minimum(tl.maximum(level_B[None, :] + steps_41, 0.0), LEVELS - 1)
    error_4B, _product_4B, _energy_4B, alternative_4B, index_4V, flipped_4V = nearest(
        values_V, importance_V, odd_V, points, factor * (2 * level_4B + 1), num_points, ALTERNATIVES, SIGNS, P, 4, B, G,
        K,
    )  # fmt: skip
    best_B = tl.argmin(error_4B, 0)
    best_V = tl.reshape(tl.broadcast_to(best_B[:, None], [B, G]), [V])
    blocks_B = super_block * B + tl.arange(0, B)
    tl.store(factors + super_block, factor.to(tl.float16))
    tl.store(levels + blocks_B, _picked(level_4B, best_B, 4).to(tl.int32))
    tl.store(alternatives + blocks_B, _picked(alternative_4B, best_B, 4))
    tl.store(indices + super_block * V + lanes_V, _picked(index_4V, best_V, 4))
    tl.store(flips + super_block * V + lanes_V, _picked(flipped_4V.to(tl.int32), best_V, 4))
