"""`code_book_rounding` on a GPU: a program takes some rows through a super-block.

What the errors of earlier columns change in 32 columns is one matrix product; among these 32 each vector's errors
change the columns after it at once.

Shape legend: S columns, W columns that are changed together, R rows of a program, G points of 8 weights, V = R * G, K
columns of earlier errors.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.code_books import TYPES, BlockScales, points_on, values_of
from dsquant.kernels.code_books_triton import EVEN, EVEN_PAIRS, FREE, POINTS_TOGETHER, nearest

ROWS = 16
WARPS = 1
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
    (size, num_rows), (alternatives, num_points, width) = weight_SO.shape, points_AKP.shape
    codes_SO, errors_SO = torch.empty_like(weight_SO, dtype=torch.uint8), torch.empty_like(weight_SO)
    scale_BO, alternative_BO = scales.scale_OB.T.contiguous(), scales.alternative_OB.T.to(torch.int32).contiguous()
    values_O8 = weight_SO.new_empty(num_rows, VECTOR.value)
    signs = {"free": FREE, "delta": FREE, "even": EVEN if width == VECTOR.value else EVEN_PAIRS}[kind.signs]
    _round[triton.cdiv(num_rows, ROWS),](
        weight_SO.contiguous(), factor_SS.contiguous(), importance_S.contiguous(), scale_BO, alternative_BO,
        points_AKP.contiguous(), codes_AKP.contiguous(), values_O8,
        codes_SO, errors_SO, num_rows, size, kind.block, num_points, alternatives, width, signs.value,
        kind.signs == "delta", len(values_of(type_name)) - 1, ROWS, POINTS_TOGETHER[width], num_warps=WARPS,
    )  # fmt: skip
    return codes_SO, errors_SO


@triton.jit
def _changed(weight, factor, errors, first, rows_R, num_rows, S: tl.constexpr, R: tl.constexpr):
    """Columns, [W, R], changed by the errors of all before them."""
    inside_1R = (rows_R < num_rows)[None, :]
    columns_W = first + tl.arange(0, W)
    change_WR = tl.zeros([W, R], tl.float32)
    for before in range(0, first, K):
        columns_K = before + tl.arange(0, K)
        factor_WK = tl.load(factor + columns_K[None, :] * S + columns_W[:, None])
        errors_KR = tl.load(errors + columns_K[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
        change_WR = tl.dot(factor_WK, errors_KR, change_WR, input_precision="tf32x3")
    weight_WR = tl.load(weight + columns_W[:, None] * num_rows + rows_R[None, :], mask=inside_1R, other=0.0)
    return weight_WR - change_WR


@triton.jit
def _picked(values_RG, point: tl.constexpr, G: tl.constexpr):
    """One point's values, [R]."""
    return tl.sum(tl.where(tl.arange(0, G)[None, :] == point, values_RG, 0), 1)


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
def _points(
    values_V, importance_V, odd_V, points, scale_R, second_V, POINTS: tl.constexpr, ALTERNATIVES: tl.constexpr,
    SIGNS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The place among all points of the nearest of each vector's alternative, and whether a sign is given up."""
    G: tl.constexpr = VECTOR // P
    _e, _p, _n, _a, index_1V, flipped_1V = nearest(
        values_V, importance_V, odd_V, points, scale_R[None, :], POINTS, 1, SIGNS, P, 1, R, G, TOGETHER
    )
    index_V, flipped_V = tl.reshape(index_1V, [R * G]), tl.reshape(flipped_1V, [R * G])
    if ALTERNATIVES > 1:
        _e, _p, _n, _a, other_1V, _f = nearest(
            values_V, importance_V, odd_V, points + POINTS * P, scale_R[None, :], POINTS, 1, SIGNS, P, 1, R, G, TOGETHER
        )
        index_V = tl.where(second_V, tl.reshape(other_1V, [R * G]) + POINTS, index_V)
    return index_V, flipped_V


@triton.jit
def _column(
    points, point_codes, index_V, lane_V, value_R, place: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    SIGNED: tl.constexpr, LAST_CODE: tl.constexpr,
):  # fmt: skip
    """What one of 8 columns becomes in units of its scale, and its code, with the sign of its value unless given up."""
    G: tl.constexpr = VECTOR // P
    point_RG = tl.reshape(tl.load(points + index_V * P + place % P), [R, G])
    code_RG = tl.reshape(tl.load(point_codes + index_V * P + place % P).to(tl.int32), [R, G])
    point_R, code_R = _picked(point_RG, place // P, G), _picked(code_RG, place // P, G)
    if not SIGNED:
        flip_R = _picked(tl.reshape((lane_V == place % P).to(tl.int32), [R, G]), place // P, G) != 0
        negative_R = (value_R < 0) != flip_R
        point_R = tl.where(negative_R, -point_R, point_R)
        code_R = tl.where(negative_R, LAST_CODE - code_R, code_R)
    return point_R, code_R


# num_rows unspecialized, as in `compensation_triton`.
@triton.jit(do_not_specialize=["num_rows"])
def _round(
    weight, factor, importance, scales, alternatives, points, point_codes, values, codes, errors, num_rows,
    S: tl.constexpr, BLOCK: tl.constexpr, POINTS: tl.constexpr, ALTERNATIVES: tl.constexpr, P: tl.constexpr,
    SIGNS: tl.constexpr, SIGNED: tl.constexpr, LAST_CODE: tl.constexpr, R: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = VECTOR // P
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    lanes_V = tl.arange(0, R * G)
    rows_V = tl.minimum(tl.program_id(0) * R + lanes_V // G, num_rows - 1)
    values_V = values + rows_V * VECTOR + lanes_V % G * P
    columns_W = tl.arange(0, W)
    for first in range(0, S, W):
        tl.debug_barrier()  # what one thread wrote, another reads
        working_WR = _changed(weight, factor, errors, first, rows_R, num_rows, S, R)
        for start in range(0, W, VECTOR):
            column = first + start
            negatives_R = tl.zeros([R], tl.int32)
            tl.debug_barrier()
            for place in tl.static_range(VECTOR):
                value_R = tl.sum(tl.where((columns_W == start + place)[:, None], working_WR, 0.0), 0)
                negatives_R += (value_R < 0).to(tl.int32)
                tl.store(values + rows_R * VECTOR + place, value_R if SIGNED else tl.abs(value_R), mask=inside_R)
            tl.debug_barrier()
            block = column // BLOCK
            scale_R = tl.load(scales + block * num_rows + rows_R, mask=inside_R, other=0.0)
            odd_V = tl.reshape(tl.broadcast_to((negatives_R % 2 == 1)[:, None], [R, G]), [R * G])
            importance_V = importance + column + lanes_V % G * P
            second_V = tl.load(alternatives + block * num_rows + rows_V) == 1
            index_V, flipped_V = _points(
                values_V, importance_V, odd_V, points, scale_R, second_V, POINTS, ALTERNATIVES, SIGNS, P, R, TOGETHER
            )
            lane_V = _flipped_lane(values_V, importance_V, points + index_V * P, P)
            lane_V = tl.where(flipped_V, lane_V, -1)
            before_WR = working_WR
            for place in tl.static_range(VECTOR):
                here_W1 = (columns_W == start + place)[:, None]
                value_R = tl.sum(tl.where(here_W1, before_WR, 0.0), 0)
                point_R, code_R = _column(points, point_codes, index_V, lane_V, value_R, place, P, R, SIGNED, LAST_CODE)
                # The column as the errors before it in the vector have changed it, whose point is chosen already.
                changed_R = tl.sum(tl.where(here_W1, working_WR, 0.0), 0)
                row = factor + (column + place) * S
                error_R = tl.div_rn(changed_R - point_R * scale_R, tl.load(row + column + place))
                after_W = tl.where(columns_W > start + place, tl.load(row + first + columns_W), 0.0)
                working_WR -= after_W[:, None] * error_R[None, :]
                place_R = (column + place) * num_rows + rows_R
                tl.store(codes + place_R, code_R.to(tl.uint8), mask=inside_R)
                tl.store(errors + place_R, error_R, mask=inside_R)
