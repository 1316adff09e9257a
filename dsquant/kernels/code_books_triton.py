"""`code_book_search` on a GPU: a program keeps a super-block's sums in registers while its vectors' neighbours pass by.

Points are whole numbers here, of a byte each: scales are multiplied by the type's unit, a power of two.

Shape legend: V vectors of a super-block, B blocks of it, P weights of a vector, K neighbours that are looked at
together, F candidate factors.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsquant.kernels import code_book_search, code_books
from dsquant.kernels.code_book_neighbours import neighbours_of
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
# What reading a byte into a float32's lowest bits adds to it.
BYTES = tl.constexpr(2.0**23)
BYTES_BITS = tl.constexpr(0x4B000000)
# How the shift of points is chosen: there is none, or one for a block, or for a vector.
SHIFTS = {"": tl.constexpr(0), "blocks": tl.constexpr(1), "vectors": tl.constexpr(2)}
PER_BLOCK, PER_VECTOR = SHIFTS["blocks"], SHIFTS["vectors"]
# Neighbours that are looked at together; measured on an H200 with 1 to 16, and one to four warps.
TOGETHER = 4
WARPS = 1


class Book(NamedTuple):
    """What the kernels read of a type."""

    grid: torch.Tensor
    """int32 [K * P / 4], points' values in bytes, the first lowest, from 0 where they have signs."""
    near: torch.Tensor
    """int16, `Neighbours.nearest_MC`."""
    bounds: torch.Tensor
    """float32 [J], `Neighbours.bounds_J` in units."""


@cache
def book_on(device: torch.device, type_name: str) -> Book:
    """Copies a type's tables to a device once."""
    near, kind = neighbours_of(type_name), code_books.TYPES[type_name]
    whole_KP = (near.grid_KP / kind.unit).round().int() + (kind.signs == "delta")
    words = (whole_KP.view(-1, 4) << 8 * torch.arange(4, dtype=torch.int32)).sum(1, dtype=torch.int32)
    return Book(*(part.contiguous().to(device) for part in (words, near.nearest_MC, near.bounds_J / kind.unit)))


def constants_of(type_name: str) -> dict[str, int | float]:
    """Returns what the kernels are compiled for: names and values of their constants."""
    kind, near = code_books.TYPES[type_name], neighbours_of(type_name)
    num_points, width = near.grid_KP.shape
    signs = {"free": FREE, "delta": FREE, "even": EVEN if width == code_books.VECTOR else EVEN_PAIRS}[kind.signs]
    return {
        "POINTS": num_points,
        "P": width,
        "NEAR": near.nearest_MC.shape[1],
        "BASE": near.base,
        "UNIT": kind.unit,
        "SHIFT": near.shifts[0],
        "SHIFTED": SHIFTS[kind.shifted].value,
        "SIGNS": signs.value,
    }


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
    kind, constants = vectors.kind, constants_of(vectors.type_name)
    num_supers, per_super = vectors.num_supers, SUPER_BLOCK // vectors.weight_NGP.shape[2]
    num_blocks = SUPER_BLOCK // kind.block
    weight, importance = vectors.weight_NGP.contiguous(), vectors.importance_NGP.contiguous()
    values = weight if kind.signs == "delta" else weight.abs()
    device = weight.device
    factor_S = torch.empty(num_supers, dtype=torch.float16, device=device)
    level_SB = torch.empty(num_supers, num_blocks, dtype=torch.int32, device=device)
    number_SV, flipped_SV = torch.empty(2, num_supers, per_super, dtype=torch.int32, device=device)
    first, last = kind.candidates
    largest_point = float(code_books.points_of(vectors.type_name).abs().max())
    _search[(num_supers,)](
        values, importance, vectors.odd_NG.to(torch.int32).contiguous(), *book_on(device, vectors.type_name),
        factor_S, level_SB, number_SV, flipped_SV,
        largest_point, first, (last - first) / (code_book_search.CANDIDATES - 1),
        V=per_super, B=num_blocks, LEVELS=kind.levels, K=TOGETHER, **constants,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    shape, num_points = vectors.weight_NGP.shape[:2], code_books.points_of(vectors.type_name).shape[1]
    number_NG, flipped_NG = number_SV.view(shape).long(), flipped_SV.view(shape).bool()
    index_NG, alternative_N = number_NG % num_points, number_NG[:, 0] // num_points
    negative_NGP = code_books.signs_of(vectors, index_NG, flipped_NG)
    return code_books.Chosen(factor_S, level_SB.flatten().long(), index_NG, negative_NGP, alternative_N)


@triton.jit
def _rows(values_V, bounds, under, P: tl.constexpr, BASE: tl.constexpr):
    """The rows of the neighbours of each vector `under` its scale and shift, [V]."""
    scale_V, shift_V = under
    row_V = tl.zeros_like(scale_V).to(tl.int32)
    for lane in tl.static_range(P):
        value_V = tl.load(values_V + lane)
        digit_V = tl.zeros_like(row_V)
        for bound in tl.static_range(BASE - 1):
            digit_V += (value_V > (tl.load(bounds + bound) + shift_V) * scale_V).to(tl.int32)
        row_V += digit_V * BASE**lane
    return row_V


@triton.jit
def _value(word, lane: tl.constexpr, shift, SHIFTED: tl.constexpr):
    """A weight of a point whose word of four bytes this is."""
    byte = (word >> (8 * (lane % 4))) & 255
    value = (byte | BYTES_BITS).to(tl.float32, bitcast=True) - BYTES
    if SHIFTED:
        value += shift - 1
    return value


@triton.jit
def _least_errors(
    values_V, importance_V, flipped_V, tables, scale_V, shift_V, FLIP: tl.constexpr,
    P: tl.constexpr, NEAR: tl.constexpr, BASE: tl.constexpr, SHIFTED: tl.constexpr, V: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The least error of each vector over its neighbours, and the number of its point; with FLIP one sign is given up
    where `flipped_V`."""
    grid, near, bounds = tables
    row_V = _rows(values_V, bounds, (scale_V, shift_V), P, BASE)
    # Each of K lanes keeps its own least error: lanes are compared once, at the end.
    least_VK, point_VK = tl.full([V, K], float("inf"), tl.float32), tl.zeros([V, K], tl.int32)
    scale_V1, shift_V1 = scale_V[:, None], shift_V[:, None]
    for start in range(0, NEAR, K):
        tried_VK = tl.load(near + row_V[:, None] * NEAR + start + tl.arange(0, K)[None, :]).to(tl.int32)
        product_VK, energy_VK = tl.zeros([V, K], tl.float32), tl.zeros([V, K], tl.float32)
        given_up_VK = tl.full([V, K], float("inf"), tl.float32)
        word_VK = tried_VK
        for lane in tl.static_range(P):
            if lane % 4 == 0:
                word_VK = tl.load(grid + tried_VK * (P // 4) + lane // 4)
            weights_V = tl.load(importance_V + lane)
            value_VK = _value(word_VK, lane, shift_V1, SHIFTED)
            lost_VK = (weights_V * tl.load(values_V + lane))[:, None] * value_VK
            product_VK += lost_VK
            energy_VK += weights_V[:, None] * (value_VK * value_VK)
            if FLIP:
                given_up_VK = tl.minimum(given_up_VK, lost_VK)
        if FLIP:
            product_VK = tl.where(flipped_V[:, None], product_VK - 2 * given_up_VK, product_VK)
        errors_VK = scale_V1 * (scale_V1 * energy_VK - 2 * product_VK)
        better_VK = errors_VK < least_VK
        least_VK = tl.where(better_VK, errors_VK, least_VK)
        point_VK = tl.where(better_VK, tried_VK, point_VK)
    error_V, lane_V = tl.min(least_VK, 1, return_indices=True)
    is_best_VK = tl.arange(0, K)[None, :] == lane_V[:, None]
    return error_V, tl.sum(tl.where(is_best_VK, point_VK, 0), 1)


@triton.jit
def _sums(
    values_V, importance_V, grid, point_V, shift_V, flipped_V, FLIP: tl.constexpr, P: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """The product and the energy of chosen points."""
    product_V, energy_V = tl.zeros_like(shift_V), tl.zeros_like(shift_V)
    given_up_V = tl.zeros_like(shift_V) + float("inf")
    for lane in tl.static_range(P):
        weights_V = tl.load(importance_V + lane)
        word_V = tl.load(grid + point_V * (P // 4) + lane // 4)
        value_V = _value(word_V, lane, shift_V, SHIFTED)
        lost_V = weights_V * tl.load(values_V + lane) * value_V
        product_V += lost_V
        energy_V += weights_V * (value_V * value_V)
        if FLIP:
            given_up_V = tl.minimum(given_up_V, lost_V)
    if FLIP:
        product_V = tl.where(flipped_V, product_V - 2 * given_up_V, product_V)
    return product_V, energy_V


@triton.jit
def _of_blocks(values_V, B: tl.constexpr, G: tl.constexpr):
    """Sums over the vectors of each block, [B]."""
    return tl.sum(tl.reshape(values_V, [B, G]), 1)


@triton.jit
def _to_vectors(values_B, B: tl.constexpr, G: tl.constexpr):
    """Each block's value for all its vectors, [V]."""
    return tl.reshape(tl.broadcast_to(values_B[:, None], [B, G]), [B * G])


@triton.jit
def nearest(
    values_V, importance_V, odd_V, tables, scale_B, shift_V,
    POINTS: tl.constexpr, P: tl.constexpr, NEAR: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr,
    SHIFTED: tl.constexpr, SIGNS: tl.constexpr, BOTH: tl.constexpr, B: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The points of least error under each block's scale: error, product, energy [B], number and flip of each vector
    [V]. Points are shifted by `shift_V`; with BOTH the other way is tried too."""
    V: tl.constexpr = B * G
    scale_V = _to_vectors(scale_B, B, G) * UNIT
    flipped_V = odd_V & (SIGNS == EVEN)
    error_V, number_V = _least_errors(
        values_V, importance_V, flipped_V, tables, scale_V, shift_V, SIGNS == EVEN,
        P, NEAR, BASE, SHIFTED, V, K,
    )  # fmt: skip
    if SIGNS == EVEN_PAIRS:  # the sign is given up in one of two vectors, where that costs less
        found_V, place_V = _least_errors(
            values_V, importance_V, odd_V | True, tables, scale_V, shift_V, True,
            P, NEAR, BASE, SHIFTED, V, K,
        )  # fmt: skip
        first, second = tl.split(tl.reshape(found_V - error_V, [V // 2, 2]))
        flipped_V = tl.reshape(tl.join(first <= second, first > second), [V]) & odd_V
        error_V = tl.where(flipped_V, found_V, error_V)
        number_V = tl.where(flipped_V, place_V, number_V)
    if BOTH:
        other_V, place_V = _least_errors(
            values_V, importance_V, flipped_V, tables, scale_V, -shift_V, False,
            P, NEAR, BASE, SHIFTED, V, K,
        )  # fmt: skip
        better_V = other_V < error_V
        if SHIFTED == PER_BLOCK:
            better_V = _to_vectors(_of_blocks(other_V, B, G) < _of_blocks(error_V, B, G), B, G)
        error_V = tl.where(better_V, other_V, error_V)
        number_V = tl.where(better_V, place_V, number_V)
        shift_V = tl.where(better_V, -shift_V, shift_V)
    product_V, energy_V = _sums(
        values_V, importance_V, tables[0], number_V, shift_V, flipped_V, SIGNS != FREE, P, SHIFTED
    )
    product_B, energy_B = _of_blocks(product_V, B, G) * UNIT, _of_blocks(energy_V, B, G) * (UNIT * UNIT)
    number_V += (shift_V < 0).to(tl.int32) * POINTS
    return _of_blocks(error_V, B, G), product_B, energy_B, number_V, flipped_V


@triton.jit
def _rounded(values):
    return (values + ROUNDER) - ROUNDER


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
    values, importance, odd, grid, near, bounds, factors, levels, numbers, flips, largest_point, first, step,
    V: tl.constexpr, B: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, POINTS: tl.constexpr, P: tl.constexpr,
    NEAR: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr, SHIFTED: tl.constexpr,
    SIGNS: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = V // B
    super_block, tables = tl.program_id(0).to(tl.int64), (grid, near, bounds)
    lanes_V, blocks_B = tl.arange(0, V), super_block * B + tl.arange(0, B)
    values_V = values + super_block * 256 + lanes_V * P
    importance_V = importance + super_block * 256 + lanes_V * P
    odd_V = tl.load(odd + super_block * V + lanes_V) != 0
    shift_V = tl.full([V], SHIFT, tl.float32)
    weights = tl.load(values + super_block * 256 + tl.arange(0, 256))
    reaching_B = tl.max(tl.reshape(tl.abs(weights), [B, 256 // B]), 1) / largest_point
    gain_B, scale_B, energy_B = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for attempt in range(CANDIDATES + 1):  # the last is the best of the others, fitted
        tried_B = tl.where(attempt == CANDIDATES, scale_B, reaching_B * (first + step * attempt))
        _error_B, product_B, tried_energy_B, _number_V, _flipped_V = nearest(
            values_V, importance_V, odd_V, tables, tried_B, shift_V,
            POINTS, P, NEAR, BASE, UNIT, SHIFTED, SIGNS, SHIFTED != 0, B, G, K,
        )  # fmt: skip
        fitted_B = tl.maximum(product_B / tl.maximum(tried_energy_B, LEAST), 0.0)
        better_B = fitted_B * product_B > gain_B
        gain_B = tl.where(better_B, fitted_B * product_B, gain_B)
        scale_B = tl.where(better_B, fitted_B, scale_B)
        energy_B = tl.where(better_B, tried_energy_B, energy_B)
    factor, level_B = _levels(scale_B, energy_B, LEVELS, B)
    least_B, best_B = tl.full([B], float("inf"), tl.float32), level_B
    number_V, flipped_V = tl.zeros([V], tl.int32), tl.zeros([V], tl.int32)
    for attempt in range(3):  # the level, the one below it, the one above it
        away = tl.where(attempt == 2, 1.0, 0.0 - attempt)
        tried_B = tl.minimum(tl.maximum(level_B + away, 0.0), LEVELS - 1)
        error_B, _product_B, _energy_B, tried_V, tried_flipped_V = nearest(
            values_V, importance_V, odd_V, tables, factor * (2 * tried_B + 1), shift_V,
            POINTS, P, NEAR, BASE, UNIT, SHIFTED, SIGNS, SHIFTED != 0, B, G, K,
        )  # fmt: skip
        better_B = error_B < least_B
        better_V = _to_vectors(better_B, B, G)
        least_B, best_B = tl.where(better_B, error_B, least_B), tl.where(better_B, tried_B, best_B)
        number_V = tl.where(better_V, tried_V, number_V)
        flipped_V = tl.where(better_V, tried_flipped_V.to(tl.int32), flipped_V)
    tl.store(factors + super_block, factor.to(tl.float16))
    tl.store(levels + blocks_B, best_B.to(tl.int32))
    tl.store(numbers + super_block * V + lanes_V, number_V)
    tl.store(flips + super_block * V + lanes_V, flipped_V)
