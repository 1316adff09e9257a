"""`clipping` on a GPU: a tile of weights and its group's Gram matrix are read once for all shrinks.

The products run on the matrix units in bfloat16, three of them for one in float32: x = high + low with both exact or
nearly so in bfloat16, and only low * low is left out, so a loss errs by about 2**-16 of itself.

Shape legend: O out features, I in features, G groups along I, S = group size, R rows of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dsquant.kernels.compensation_triton import shrinks_on
from dsquant.kernels.grids_triton import centred_codes, grid_of_range

ROWS = 64
WARPS = 4
# Triton's interpreter multiplies no bfloat16 matrices.
OPERAND = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def best_shrinks(
    weight_OI: torch.Tensor, grams_GSS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> torch.Tensor:
    """Searches the shrinks on the weight's GPU.

    Args:
        weight_OI: as for `clipping.best_shrinks`.
        grams_GSS: as for `clipping.best_shrinks`.
        shrinks: as for `clipping.best_shrinks`.
        bits: as for `clipping.best_shrinks`.
        symmetric: as for `clipping.best_shrinks`.

    Returns:
        As `clipping.best_shrinks`, up to shrinks whose losses are equal within 2**-16.
    """
    num_groups, size, _ = grams_GSS.shape
    num_rows = len(weight_OI)
    best_OG = weight_OI.new_empty(num_rows, num_groups)
    shrinks_C = shrinks_on(weight_OI.device, tuple(shrinks))
    tensors = (weight_OI.contiguous(), grams_GSS.contiguous(), shrinks_C, best_OG)
    shape = (len(shrinks), num_rows, num_groups, size, ROWS, bits, symmetric, OPERAND)
    _best_shrinks[triton.cdiv(num_rows, ROWS), num_groups](*tensors, *shape, num_warps=WARPS)
    return best_OG


@triton.jit
def split(values, OPERAND: tl.constexpr):
    """Values as the sum of two bfloat16 ones: the upper bits, and the rest."""
    high = (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(OPERAND), (values - high).to(OPERAND)


@triton.jit
def _best_shrinks(
    weight,
    grams,
    shrinks,
    best,
    num_shrinks,
    num_rows,
    num_groups,
    S: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OPERAND: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    columns_S = tl.arange(0, S)
    places_RS = (rows_R.to(tl.int64) * num_groups + group)[:, None] * S + columns_S[None, :]
    weight_RS = tl.load(weight + places_RS, mask=(rows_R < num_rows)[:, None], other=0.0)
    gram_SS = tl.load(grams + group * S * S + columns_S[:, None] * S + columns_S[None, :])
    gram_high_SS, gram_low_SS = split(gram_SS, OPERAND)
    low_R, high_R = tl.min(weight_RS, 1), tl.max(weight_RS, 1)
    best_R = tl.full([R], 1.0, tl.float32)
    least_R = tl.full([R], float("inf"), tl.float32)
    for place in range(num_shrinks):
        shrink = tl.load(shrinks + place)
        scales_R, zeros_R = grid_of_range(low_R, high_R, shrink, BITS, SYMMETRIC)
        codes_RS = centred_codes(weight_RS, scales_R[:, None], zeros_R[:, None], BITS)
        difference_RS = codes_RS * scales_R[:, None] - weight_RS
        high_RS, low_RS = split(difference_RS, OPERAND)
        product_RS = tl.dot(low_RS, gram_high_SS, input_precision="ieee")
        product_RS = tl.dot(high_RS, gram_low_SS, product_RS, input_precision="ieee")
        product_RS = tl.dot(high_RS, gram_high_SS, product_RS, input_precision="ieee")
        losses_R = tl.sum(product_RS * difference_RS, 1)
        best_R = tl.where(losses_R < least_R, shrink, best_R)
        least_R = tl.minimum(losses_R, least_R)
    tl.store(best + rows_R * num_groups + group, best_R, mask=rows_R < num_rows)
