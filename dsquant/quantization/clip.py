"""The search for AWQ's clipping: each group's range is shrunk where that lowers the output error.

Shape legend: C candidates, O out features, I in features, G groups, B blocks that share a scale, S = block size.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.clipping import clip_losses
from dsquant.kernels.grids import round_rows
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.threads import side_by_side
from dsquant.quantization.statistics import GPU_ELEMENTS_AT_ONCE, InputMoments
from dsquant.schemes import QuantizedWeight, Scheme, quantized, round_to_nearest, stacked

FULL_RANGE = (1.0,)
# Rows of a weight are rounded in parts, so many of them at a time at the most, which have so many weights together: it
# bounds what rounding takes beside the weight.
ELEMENTS_AT_ONCE = 2**24
PARTS_AT_ONCE = 4


def clipped_weight(
    weight_OI: torch.Tensor, scheme: Scheme, moments: InputMoments, clip_ratios: Sequence[float] | None = None
) -> QuantizedWeight:
    """Rounds a weight [O, I] with each group's range times the ratio of the least output error.

    The ratio of a (row, group) minimises the sum of its blocks' dw H_bb dw^T with H_bb their parts of the Gram matrix.
    A row keeps its ratios only where its whole error dw H dw^T falls too, since the blocks' errors may add up
    differently; so no row errs more than under plain rounding. The first ratio is 1; `FULL_RANGE` rounds plainly, with
    parameters that weigh the inputs' energy where they are searched; None takes the scheme's ratios.
    """
    return clipped_with_losses(weight_OI, scheme, moments, clip_ratios)[0]


def clipped_with_losses(
    weight_OI: torch.Tensor, scheme: Scheme, moments: InputMoments, clip_ratios: Sequence[float] | None = None
) -> tuple[QuantizedWeight, torch.Tensor | None]:
    """Returns what `clipped_weight` does, and each row's output error, float32 [O], where it had to be computed."""
    scheme = scheme.fitted(weight_OI)
    ratios = scheme.clip_ratios if clip_ratios is None else tuple(clip_ratios)
    if ratios == FULL_RANGE and not scheme.searched:
        return round_to_nearest(weight_OI, scheme), None
    importance_I, parts = moments.rms_I.square(), weight_OI.split(rows_of_part(weight_OI))
    if ratios == FULL_RANGE:
        rounded = [quantized(*scheme.round_plainly(part_OI, importance_I), scheme) for part_OI in parts]
        return stacked(rounded), None
    grams_BSS = moments.group_grams_GSS(scheme.block_size)

    def clipped_rows(part_OI: torch.Tensor) -> tuple[QuantizedWeight, torch.Tensor]:
        plain, clipped = _clip_rows(part_OI, scheme, (grams_BSS, importance_I), ratios)
        with fast_matmuls(part_OI.device):
            plain_O, clipped_O = (moments.loss_O(found.difference(part_OI)) for found in (plain, clipped))
        kept_O = clipped_O < plain_O
        return clipped.or_else(plain, kept_O), torch.where(kept_O, clipped_O, plain_O)

    found, losses = zip(*side_by_side(clipped_rows, parts, PARTS_AT_ONCE), strict=True)
    return stacked(found), torch.cat(losses)


def rows_of_part(weight_OI: torch.Tensor) -> int:
    """Returns how many rows of a weight [O, I] are rounded as one part."""
    elements = GPU_ELEMENTS_AT_ONCE if weight_OI.is_cuda else ELEMENTS_AT_ONCE // PARTS_AT_ONCE
    return max(1, elements // weight_OI.shape[1])


def _clip_rows(
    weight_OI: torch.Tensor, scheme: Scheme, inputs: tuple[torch.Tensor, torch.Tensor], clip_ratios: Sequence[float]
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Rows rounded plainly, and with each group's best ratio: the first of equals, or where no loss is a number."""
    grams_BSS, importance_I = inputs
    blocks, candidates = scheme.group_size // scheme.block_size, scheme.parameters(weight_OI, clip_ratios, importance_I)
    losses_COB = clip_losses(weight_OI, grams_BSS, candidates, scheme.levels)
    losses_COG = losses_COB.unflatten(2, (-1, blocks)).sum(3)
    best_OG = torch.where(losses_COG.isnan(), torch.inf, losses_COG).argmin(0)
    found = (
        candidates.chosen(best) for best in (torch.zeros_like(best_OG[:, :1]), best_OG.repeat_interleave(blocks, 1))
    )
    plain, clipped = (quantized(round_rows(weight_OI, one, scheme.levels), one, scheme) for one in found)
    return plain, clipped
