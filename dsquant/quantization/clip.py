"""The search for AWQ's clipping: each group's range is shrunk where that lowers the output error.

Shape legend: O out features, I in features, G groups, S = group size.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.clipping import best_shrinks
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.threads import side_by_side
from dsquant.quantization.statistics import GPU_ELEMENTS_AT_ONCE, InputMoments
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest, stacked

# AutoAWQ goes down to 0.55 in steps of 0.05; less than 0.65 was never chosen, so the same number of steps is finer.
SHRINKS = tuple(1 - step / 25 for step in range(10))
FULL_RANGE = (1.0,)
# Rows of a weight are rounded in parts, so many of them at a time at the most, which have so many weights together: it
# bounds what rounding takes beside the weight.
ELEMENTS_AT_ONCE = 2**24
PARTS_AT_ONCE = 4


def clipped_weight(
    weight_OI: torch.Tensor, grid: Grid, moments: InputMoments, shrinks: Sequence[float] = SHRINKS
) -> QuantizedWeight:
    """Rounds a weight with each group's range shrunk to what serves the output best.

    The shrink of a (row, group) minimises dw H_gg dw^T with H_gg the group's block of the Gram matrix; a row keeps its
    shrinks only where its whole error dw H dw^T falls too, since the groups' errors may add up differently.

    Args:
        weight_OI: float32 [O, I].
        grid: the quantization grid.
        moments: the inputs' moments.
        shrinks: factors in (0, 1] on the range that the grid spans; `FULL_RANGE` rounds plainly.

    Returns:
        The rounded weight, no row of which errs more than under plain rounding.
    """
    if shrinks == FULL_RANGE:
        return round_to_nearest(weight_OI, grid)
    grams_GSS = moments.group_grams_GSS(grid.group_size)
    parts = weight_OI.split(rows_of_part(weight_OI))
    return stacked(
        side_by_side(lambda rows_OI: _clip_rows(rows_OI, grid, moments, grams_GSS, shrinks), parts, PARTS_AT_ONCE)
    )


def rows_of_part(weight_OI: torch.Tensor) -> int:
    """How many rows of a weight [O, I] are rounded as one part."""
    elements = GPU_ELEMENTS_AT_ONCE if weight_OI.is_cuda else ELEMENTS_AT_ONCE // PARTS_AT_ONCE
    return max(1, elements // weight_OI.shape[1])


def _clip_rows(
    weight_OI: torch.Tensor, grid: Grid, moments: InputMoments, grams_GSS: torch.Tensor, shrinks: Sequence[float]
) -> QuantizedWeight:
    shrink_OG = best_shrinks(weight_OI, grams_GSS, shrinks, grid.bits, grid.symmetric)
    plain, clipped = (round_to_nearest(weight_OI, grid, shrink) for shrink in (1.0, shrink_OG))
    with fast_matmuls(weight_OI.device):
        plain_O, clipped_O = (moments.loss_O(part.difference(weight_OI)) for part in (plain, clipped))
    return clipped.or_else(plain, clipped_O < plain_O)
