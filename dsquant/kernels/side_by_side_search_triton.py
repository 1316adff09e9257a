"""The searches of `scale_search` with four candidates of a row side by side, for `super_blocks_triton`.

A thread holds one candidate of a row, so sums over a block's columns stay in it.

Shape legend: W columns of a block, B blocks, R rows of a program, C candidates, P = C * R threads.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from dsquant.kernels.grids_triton import TABLE, nearest_level
from dsquant.kernels.scale_search_triton import (
    AFFINE_FIRST,
    AFFINE_STEP,
    AFFINE_TRIES,
    BETTER,
    LARGEST_SCALE,
    LEAST,
    SCALE_FIRST,
    SCALE_STEP,
    SCALE_TRIES,
    furthest,
    rounded,
)

C: tl.constexpr = tl.constexpr(4)


@triton.jit
def first_of_best(gains_P, order_P, R: tl.constexpr, TOLERANCE: tl.constexpr):
    """The thread of each row with the largest gain, the least in order of those next to it: a mask [P]."""
    gains_CR = tl.reshape(gains_P, [C, R])
    order_CR = tl.reshape(order_P, [C, R])
    good_CR = gains_CR * TOLERANCE >= tl.max(gains_CR, 0)[None, :]
    first_R = tl.min(tl.where(good_CR, order_CR, 1 << 20), 0)
    return tl.reshape((order_CR == first_R[None, :]).to(tl.int32), [C * R])


@triton.jit
def _of_best(values_P, best_P, R: tl.constexpr):
    """The value of each row's best thread, in all its threads."""
    values_CR = tl.reshape(tl.where(best_P > 0, values_P, 0.0), [C, R])
    return tl.reshape(tl.broadcast_to(tl.sum(values_CR, 0)[None, :], [C, R]), [C * R])


@triton.jit
def affine(weight_WP, weights_WP, lane_P, R: tl.constexpr, STEPS: tl.constexpr, SIGNED: tl.constexpr):
    """As `scale_search_triton.affine_lines`, every fourth candidate to a thread."""
    low_P = tl.min(weight_WP, 0)
    if not SIGNED:
        low_P = tl.minimum(low_P, 0.0)
    range_P = tl.max(weight_WP, 0) - low_P
    safe_range_P = tl.maximum(range_P, LEAST)
    unit_WP = (weight_WP - low_P[None, :]) / safe_range_P[None, :]
    mean_P = tl.sum(weights_WP * unit_WP, 0)
    above_P = tl.maximum(mean_P + low_P / safe_range_P, 0.0)
    if SIGNED:
        above_P = tl.full([C * R], -1e9, tl.float32)
    centred_WP = weights_WP * (unit_WP - mean_P[None, :])
    best_P = tl.zeros([C * R], tl.float32)
    slope_P = tl.full([C * R], 1 / STEPS, tl.float32)
    best_code_P = tl.zeros([C * R], tl.float32)
    order_P = lane_P - C
    for first in range(0, AFFINE_TRIES, C):
        number_P = first + lane_P
        tried_P = STEPS + AFFINE_FIRST + AFFINE_STEP * number_P
        codes_WP = tl.minimum(rounded(unit_WP * tried_P[None, :]), STEPS)
        weighted_WP = weights_WP * codes_WP
        code_P = tl.sum(weighted_WP, 0)
        square_P = tl.maximum(tl.sum(weighted_WP * codes_WP, 0), LEAST)
        product_P = tl.sum(centred_WP * codes_WP, 0)
        slope = product_P / tl.maximum(square_P - code_P * code_P, LEAST)
        fixed = slope * code_P < above_P
        product_P = tl.where(fixed, product_P + above_P * code_P, product_P)
        slope = tl.where(fixed, product_P / square_P, slope)
        gain_P = slope * product_P - tl.where(fixed, above_P * above_P, 0.0)
        better = (gain_P > best_P) & (number_P < AFFINE_TRIES)
        best_P = tl.where(better, gain_P, best_P)
        slope_P = tl.where(better, slope, slope_P)
        best_code_P = tl.where(better, code_P, best_code_P)
        order_P = tl.where(better, number_P, order_P)
    first_P = first_of_best(best_P, order_P, R, 1.0)
    return _of_best(slope_P, first_P, R) * range_P, _of_best(best_code_P, first_P, R), low_P + mean_P * range_P


@triton.jit
def symmetric(
    weight_WP, weights_WP, lane_P, searched, num_searched, table,
    R: tl.constexpr, MIDDLE: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """As `scale_search.symmetric_search`, every fourth candidate to a thread."""
    extreme_P = furthest(tl.max(weight_WP, 0), tl.min(weight_WP, 0))
    inverse_P = tl.where(extreme_P != 0, -1 / tl.where(extreme_P != 0, extreme_P, 1.0), 0.0)
    unit_WP = weight_WP * inverse_P[None, :]
    best_P = tl.zeros([C * R], tl.float32)
    scale_P = tl.zeros([C * R], tl.float32)
    order_P = lane_P - C
    for first in range(0, num_searched, C):
        number_P = first + lane_P
        values_WP = unit_WP * tl.load(searched + number_P, mask=number_P < num_searched, other=0.0)[None, :]
        if KIND == TABLE:
            _, levels_WP = nearest_level(values_WP, table, LARGEST, KIND)
        else:
            levels_WP = tl.minimum(tl.maximum(rounded(values_WP), -MIDDLE + 0.0), LARGEST - MIDDLE + 0.0)
        weighted_WP = weights_WP * levels_WP
        product_P = tl.sum(weighted_WP * unit_WP, 0)
        scale = product_P / tl.maximum(tl.sum(weighted_WP * levels_WP, 0), LEAST)
        better = (scale * product_P > best_P * BETTER) & (number_P < num_searched)
        best_P = tl.where(better, scale * product_P, best_P)
        scale_P = tl.where(better, scale, scale_P)
        order_P = tl.where(better, number_P, order_P)
    return _of_best(scale_P, first_of_best(best_P, order_P, R, BETTER), R) * -extreme_P


@triton.jit
def factors_of(values_BP, shares_BP, lane_P, R: tl.constexpr, LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr):
    """As `scale_search.scale_search`, every fourth candidate to a thread: factors and multiples of them."""
    reach: tl.constexpr = -LEAST_CODE if LEAST_CODE < 0 else LARGEST_CODE
    extreme_P = tl.max(values_BP, 0)
    if LEAST_CODE < 0:
        extreme_P = -furthest(extreme_P, tl.min(values_BP, 0))
    safe_extreme_P = tl.where(tl.abs(extreme_P) < LEAST, LEAST, extreme_P)
    unit_BP = values_BP / safe_extreme_P[None, :]
    best_P = tl.full([C * R], float("-inf"), tl.float32)
    best_factor_P = tl.zeros([C * R], tl.float32)
    order_P = lane_P - C
    for first in range(0, SCALE_TRIES, C):
        number_P = first + lane_P
        tried_P = reach + (SCALE_FIRST + SCALE_STEP * number_P) * (reach / LARGEST_SCALE)
        codes_BP = tl.minimum(tl.maximum(rounded(unit_BP * tried_P[None, :]), LEAST_CODE + 0.0), LARGEST_CODE + 0.0)
        weighted_BP = shares_BP * codes_BP
        square_P = tl.maximum(tl.sum(weighted_BP * codes_BP, 0), LEAST)
        factor_P = (tl.sum(weighted_BP * unit_BP, 0) / square_P * extreme_P).to(tl.float16).to(tl.float32)
        stored_P = factor_P / safe_extreme_P
        rest_BP = unit_BP - stored_P[None, :] * _multiples(unit_BP, stored_P, LEAST_CODE, LARGEST_CODE)
        gain_P = -tl.sum(shares_BP * rest_BP * rest_BP, 0)
        better = (gain_P > best_P) & (number_P < SCALE_TRIES)
        best_P = tl.where(better, gain_P, best_P)
        best_factor_P = tl.where(better, factor_P, best_factor_P)
        order_P = tl.where(better, number_P, order_P)
    factor_P = _of_best(best_factor_P, first_of_best(best_P, order_P, R, 1.0), R)
    return factor_P, _multiples(unit_BP, factor_P / safe_extreme_P, LEAST_CODE, LARGEST_CODE)


@triton.jit
def _multiples(unit_BP, stored_P, LEAST_CODE: tl.constexpr, LARGEST_CODE: tl.constexpr):
    codes_BP = unit_BP * (1 / tl.maximum(stored_P, LEAST))[None, :]
    return rounded(tl.minimum(tl.maximum(codes_BP, LEAST_CODE + 0.0), LARGEST_CODE + 0.0))
