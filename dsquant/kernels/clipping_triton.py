"""`clipping` on a GPU: a tile of weights and its block's Gram matrix are read once for all candidates.

The products run on the matrix units in bfloat16, three of them for one in float32: x = high + low with both exact or
nearly so in bfloat16, and only low * low is left out, so a loss errs by about 2**-16 of itself.

Shape legend: C candidates, O out features, I in features, B blocks along I, S = block size, R rows of a program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from dsquant.kernels.grids_triton import nearest
from dsquant.kernels.values import Levels, Parameters, table_on

ROWS = 64
WARPS = 4
# Triton's interpreter multiplies no bfloat16 matrices.
OPERAND = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


def clip_losses(
    weight_OI: torch.Tensor, grams_BSS: torch.Tensor, candidates: Parameters, levels: Levels
) -> torch.Tensor:
    """`clipping.clip_losses` on the weight's GPU, within 2**-16 of each."""
    num_blocks, size, _ = grams_BSS.shape
    num_rows, num_candidates = len(weight_OI), len(candidates.scales)
    losses_COB = torch.empty_like(candidates.scales)
    parameters = (candidates.scales.contiguous(), candidates.zero_points.contiguous())
    tensors = (weight_OI.contiguous(), grams_BSS.contiguous(), *parameters, table_on(weight_OI.device, levels))
    shape = (num_candidates, num_rows, num_blocks, size, ROWS, levels.largest, int(levels.kind), OPERAND)
    _clip_losses[triton.cdiv(num_rows, ROWS), num_blocks](*tensors, losses_COB, *shape, num_warps=WARPS)
    return losses_COB


@triton.jit
def split(values, OPERAND: tl.constexpr):
    """Values as the sum of two bfloat16 ones: the upper bits, and the rest."""
    high = (values.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(OPERAND), (values - high).to(OPERAND)


@triton.jit
def _clip_losses(
    weight, grams, scales, zero_points, table, losses, num_candidates, num_rows, num_blocks,
    S: tl.constexpr, R: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = rows_R < num_rows
    columns_S = tl.arange(0, S)
    blocks_R = rows_R.to(tl.int64) * num_blocks + block
    weight_RS = tl.load(weight + blocks_R[:, None] * S + columns_S[None, :], mask=inside_R[:, None], other=0.0)
    gram_SS = tl.load(grams + block * S * S + columns_S[:, None] * S + columns_S[None, :])
    gram_high_SS, gram_low_SS = split(gram_SS, OPERAND)
    for _ in range(num_candidates):
        scales_R = tl.load(scales + blocks_R, mask=inside_R, other=1.0)
        zeros_R = tl.load(zero_points + blocks_R, mask=inside_R, other=0.0)
        _, rounded_RS = nearest(weight_RS, scales_R[:, None], zeros_R[:, None], table, LARGEST, KIND)
        difference_RS = rounded_RS - weight_RS
        high_RS, low_RS = split(difference_RS, OPERAND)
        product_RS = tl.dot(low_RS, gram_high_SS, input_precision="ieee")
        product_RS = tl.dot(high_RS, gram_low_SS, product_RS, input_precision="ieee")
        product_RS = tl.dot(high_RS, gram_high_SS, product_RS, input_precision="ieee")
        tl.store(losses + blocks_R, tl.sum(product_RS * difference_RS, 1), mask=inside_R)
        blocks_R += num_rows * num_blocks
