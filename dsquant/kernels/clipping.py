"""The clip search: for each (row, group) the shrink of its range that costs least output error inside the group.

Shape legend: O out features, I in features, G groups along I, S = group size.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.grids import grid_parameters


def best_shrinks(
    weight_OI: torch.Tensor, grams_GSS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> torch.Tensor:
    """The shrink with the least dw H_gg dw^T of each (row, group), dw the error of plain rounding.

    Args:
        weight_OI: float32 [O, I].
        grams_GSS: float32 [G, S, S], symmetric: each group's block of the inputs' Gram matrix.
        shrinks: factors in (0, 1] on the range that the grid spans.
        bits: of a code.
        symmetric: whether the grid's zero point is constant.

    Returns:
        float32 [O, G]; the first of equals, and 1 where no loss is a number.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import clipping_triton

        return clipping_triton.best_shrinks(weight_OI, grams_GSS, shrinks, bits, symmetric)
    return best_shrinks_reference(weight_OI, grams_GSS, shrinks, bits, symmetric)


def best_shrinks_reference(
    weight_OI: torch.Tensor, grams_GSS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> torch.Tensor:
    """`best_shrinks` in PyTorch, on any device.

    Args:
        weight_OI: as for `best_shrinks`.
        grams_GSS: as for `best_shrinks`.
        shrinks: as for `best_shrinks`.
        bits: as for `best_shrinks`.
        symmetric: as for `best_shrinks`.

    Returns:
        As `best_shrinks`.
    """
    num_groups, size, _ = grams_GSS.shape
    best_OG = weight_OI.new_ones(len(weight_OI), num_groups)
    least_OG = torch.full_like(best_OG, torch.inf)
    weight_OGS = weight_OI.unflatten(1, (-1, size))
    for shrink in shrinks:
        scales_OG, zero_points_OG = grid_parameters(weight_OI, size, bits, symmetric, shrink)
        scales_OG1, zero_points_OG1 = scales_OG.unsqueeze(-1), zero_points_OG.unsqueeze(-1)
        codes_OGS = (weight_OGS / scales_OG1).round_().add_(zero_points_OG1).clamp_(0, 2**bits - 1)
        difference_GOS = codes_OGS.sub_(zero_points_OG1).mul_(scales_OG1).sub_(weight_OGS).transpose(0, 1)
        loss_OG = torch.bmm(difference_GOS, grams_GSS).mul_(difference_GOS).sum(2).T
        best_OG[loss_OG < least_OG] = shrink
        least_OG = torch.minimum(least_OG, loss_OG)
    return best_OG
