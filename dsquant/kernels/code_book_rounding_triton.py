"""`code_book_rounding` on a GPU: a program takes some rows through a super-block.

What the errors of earlier columns change in 32 columns is one matrix product; among these 32 each vector is changed by
the errors of those before it. Threads hand over what others need through memory, which a multiprocessor's cache holds.

Shape legend: S columns, W columns that are changed together, R rows of a program, 8 columns of a vector, G points of
8 weights, V = R * G, K columns of earlier errors.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.code_books import TYPES, BlockScales, points_on, values_of
from dsquant.kernels.code_books_triton import PER_VECTOR, book_on, constants_of, nearest

# Measured on an H200 with 1 to 8 warps, 16 and 32 rows, 8 to 32 neighbours together.
ROWS = 16
WARPS = 4
TOGETHER = 32
W: tl.constexpr = tl.constexpr(32)
K: tl.constexpr = tl.constexpr(16)
VECTOR: tl.constexpr = tl.constexpr(8)


def compensate_points(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, scales: BlockScales, type_name: str,
    codes_AKP: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`code_book_rounding.compensate_points_reference` on the weight's GPU, up to the order of sums; `codes_AKP` are
    those of the points."""
    kind, points_AKP = TYPES[type_name], points_on(weight_SO.device, type_name)
    (size, num_rows), width, device = weight_SO.shape, points_AKP.shape[2], weight_SO.device
    codes_SO, errors_SO = torch.empty_like(weight_SO, dtype=torch.uint8), torch.empty_like(weight_SO)
    scale_BO, alternative_BO = scales.scale_OB.T.contiguous(), scales.alternative_OB.T.to(torch.int32).contiguous()
    values_O8, working_WO = weight_SO.new_empty(num_rows, VECTOR.value), weight_SO.new_empty(W.value, num_rows)
    chosen_2OG = torch.empty(2, num_rows, VECTOR.value // width, dtype=torch.int32, device=device)
    _round[triton.cdiv(num_rows, ROWS),](
        weight_SO.contiguous(), factor_SS.contiguous(), importance_S.contiguous(), scale_BO, alternative_BO,
        *book_on(device, type_name), points_AKP.contiguous(), codes_AKP.contiguous(),
        values_O8, working_WO, *chosen_2OG, codes_SO, errors_SO, num_rows,
        S=size, BLOCK=kind.block, SIGNED=kind.signs == "delta", LAST_CODE=len(values_of(type_name)) - 1,
        R=ROWS, TOGETHER=min(TOGETHER, kind.neighbours), **constants_of(type_name), num_warps=WARPS,
    )  # fmt: skip
    return codes_SO, errors_SO


@triton.jit
def _changed(weight, changes, first, rows, S: tl.constexpr):
    """Columns, [W, R], changed by the errors of all before them; `changes` are U and the errors."""
    factor, errors = changes
    rows_R, num_rows = rows
    inside_1R = (rows_R < num_rows)[None, :]
    columns_W = first + tl.arange(0, W)
    change_WR = tl.zeros([W, rows_R.shape[0]], tl.float32)
    for before in range(0, first, K):
        columns_K = before + tl.arange(0, K)
        factor_WK = tl.load(factor + columns_K[None, :] * S + columns_W[:, None])
        errors_KR = tl.load(errors + columns_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        change_WR = tl.dot(factor_WK, errors_KR, change_WR, input_precision="tf32x3")
    weight_WR = tl.load(weight + columns_W[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
    return weight_WR - change_WR


@triton.jit
def _changed_again(values_8R, changes, between, rows, S: tl.constexpr):
    """A vector's columns, changed by the errors of the columns from the first of `between` up to its own."""
    factor, errors = changes
    first, column = between
    rows_R, num_rows = rows
    for before in range(first, column, VECTOR):
        for place in tl.static_range(VECTOR):
            factor_8 = tl.load(factor + (before + place) * S + column + tl.arange(0, VECTOR))
            error_R = tl.load(errors + (before + place) * num_rows + rows_R, mask=rows_R < num_rows, other=0.0)
            values_8R -= factor_8[:, None] * error_R[None, :]
    return values_8R


@triton.jit
def _flipped_lane(values_V, importance_V, point_V, P: tl.constexpr):
    """The weight of each vector whose sign costs the least to give up."""
    least_V, lane_V = tl.load(values_V) * 0 + float("inf"), tl.load(values_V).to(tl.int32) * 0
    for lane in tl.static_range(P):
        lost_V = tl.load(importance_V + lane) * tl.load(values_V + lane) * tl.load(point_V + lane)
        better_V = lost_V < least_V
        least_V = tl.where(better_V, lost_V, least_V)
        lane_V = tl.where(better_V, lane, lane_V)
    return lane_V


@triton.jit
def _choose(
    values_V, importance_V, odd_V, second_V, tables, points, scale_R, numbers_V, lanes_V, inside_V,
    POINTS: tl.constexpr, P: tl.constexpr, NEAR: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr,
    SHIFT: tl.constexpr, SHIFTED: tl.constexpr, SIGNS: tl.constexpr, R: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Stores the number of each vector's point, and the weight whose sign it gives up, or -1."""
    G: tl.constexpr = VECTOR // P
    shift_V = tl.where(second_V, -SHIFT, SHIFT)
    _error_R, _product_R, _energy_R, number_V, flipped_V = nearest(
        values_V, importance_V, odd_V, tables, scale_R, shift_V,
        POINTS, P, NEAR, BASE, UNIT, SHIFTED, SIGNS, SHIFTED == PER_VECTOR, R, G, TOGETHER,
    )  # fmt: skip
    lane_V = _flipped_lane(values_V, importance_V, points + number_V * P, P)
    tl.store(numbers_V, number_V, mask=inside_V)
    tl.store(lanes_V, tl.where(flipped_V, lane_V, -1), mask=inside_V)


@triton.jit
def _rounded(
    values_8R, numbers_8R, lanes_8R, points, point_codes, scale_R, P: tl.constexpr, SIGNED: tl.constexpr,
    LAST_CODE: tl.constexpr,
):  # fmt: skip
    """What the columns of a vector become, and their codes, with the signs of their values unless given up."""
    place_81 = (tl.arange(0, VECTOR) % P)[:, None]
    weight_8R = tl.load(numbers_8R) * P + place_81
    point_8R, code_8R = tl.load(points + weight_8R), tl.load(point_codes + weight_8R).to(tl.int32)
    if not SIGNED:
        negative_8R = (values_8R < 0) != (tl.load(lanes_8R) == place_81)
        point_8R = tl.where(negative_8R, -point_8R, point_8R)
        code_8R = tl.where(negative_8R, LAST_CODE - code_8R, code_8R)
    return point_8R * scale_R[None, :], code_8R


@triton.jit
def _errors(left_8R, factor, S: tl.constexpr):
    """Errors over U, [8, R], of a vector's columns: each changes those after it."""
    place_8 = tl.arange(0, VECTOR)
    errors_8R = left_8R * 0
    for place in tl.static_range(VECTOR):
        here_81 = (place_8 == place)[:, None]
        error_R = tl.div_rn(tl.sum(tl.where(here_81, left_8R, 0.0), 0), tl.load(factor + place * S + place))
        after_8 = tl.where(place_8 > place, tl.load(factor + place * S + place_8), 0.0)
        left_8R -= after_8[:, None] * error_R[None, :]
        errors_8R = tl.where(here_81, error_R[None, :], errors_8R)
    return errors_8R


# num_rows unspecialized, as in `compensation_triton`.
@triton.jit(do_not_specialize=["num_rows"])
def _round(
    weight, factor, importance, scales, alternatives, grid, near, bounds, points, point_codes,
    values, working, numbers, lanes, codes, errors, num_rows,
    S: tl.constexpr, BLOCK: tl.constexpr, SIGNED: tl.constexpr, LAST_CODE: tl.constexpr, R: tl.constexpr,
    TOGETHER: tl.constexpr, POINTS: tl.constexpr, P: tl.constexpr, NEAR: tl.constexpr, BASE: tl.constexpr,
    UNIT: tl.constexpr, SHIFT: tl.constexpr, SHIFTED: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = VECTOR // P
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    tables, changes, rows = (grid, near, bounds), (factor, errors), (rows_R, num_rows)
    inside_1R = (rows_R < num_rows)[None, :]
    place_8, columns_W = tl.arange(0, VECTOR), tl.arange(0, W)
    at_8R = place_8[:, None] * num_rows + rows_R[None, :]
    chosen_8R = tl.minimum(rows_R, num_rows - 1)[None, :] * G + (place_8 // P)[:, None]
    vectors_V = tl.arange(0, R * G)
    rows_V = tl.program_id(0) * R + vectors_V // G
    inside_V = rows_V < num_rows
    rows_V = tl.minimum(rows_V, num_rows - 1)
    chosen_V = rows_V * G + vectors_V % G
    values_V = values + chosen_V * P
    for first in range(0, S, W):
        tl.debug_barrier()  # what one thread wrote, another reads
        changed_WR = _changed(weight, changes, first, rows, S)
        tl.store(working + columns_W[:, None] * num_rows + rows_R[None, :], changed_WR, mask=inside_1R)
        for column in range(first, first + W, VECTOR):
            tl.debug_barrier()
            values_8R = tl.load(working + (column - first) * num_rows + at_8R, mask=inside_1R, other=0.0)
            values_8R = _changed_again(values_8R, changes, (first, column), rows, S)
            tried_8R = values_8R if SIGNED else tl.abs(values_8R)
            tl.store(values + rows_R[None, :] * VECTOR + place_8[:, None], tried_8R, mask=inside_1R)
            odd_R = tl.sum((values_8R < 0).to(tl.int32), 0) % 2 == 1
            odd_V = tl.reshape(tl.broadcast_to(odd_R[:, None], [R, G]), [R * G])
            block = column // BLOCK
            scale_R = tl.load(scales + block * num_rows + rows_R, mask=rows_R < num_rows, other=0.0)
            second_V = tl.load(alternatives + block * num_rows + rows_V) == 1
            importance_V = importance + column + vectors_V % G * P
            tl.debug_barrier()
            _choose(
                values_V, importance_V, odd_V, second_V, tables, points, scale_R,
                numbers + chosen_V, lanes + chosen_V, inside_V,
                POINTS, P, NEAR, BASE, UNIT, SHIFT, SHIFTED, SIGNS, R, TOGETHER,
            )  # fmt: skip
            tl.debug_barrier()
            rounded_8R, codes_8R = _rounded(
                values_8R, numbers + chosen_8R, lanes + chosen_8R, points, point_codes, scale_R, P, SIGNED, LAST_CODE
            )
            tl.store(codes + column * num_rows + at_8R, codes_8R.to(tl.uint8), mask=inside_1R)
            errors_8R = _errors(values_8R - rounded_8R, factor + column * S + column, S)
            tl.store(errors + column * num_rows + at_8R, errors_8R, mask=inside_1R)
