"""The clip search: what each candidate for a block's parameters costs in output error inside the block.

Shape legend: C candidates, O out features, I in features, B blocks along I, S = block size.
"""

import torch

from dsquant.kernels.grids import nearest_codes, weights_of_codes
from dsquant.kernels.values import Levels, Parameters


def clip_losses(
    weight_OI: torch.Tensor, grams_BSS: torch.Tensor, candidates: Parameters, levels: Levels
) -> torch.Tensor:
    """Returns each block's dw H_bb dw^T, dw the error of plain rounding, under each candidate: float32 [C, O, B].

    Each of `grams_BSS`, float32 [B, S, S] and symmetric, is a block's part of the inputs' Gram matrix.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import clipping_triton

        return clipping_triton.clip_losses(weight_OI, grams_BSS, candidates, levels)
    return clip_losses_reference(weight_OI, grams_BSS, candidates, levels)


def clip_losses_reference(
    weight_OI: torch.Tensor, grams_BSS: torch.Tensor, candidates: Parameters, levels: Levels
) -> torch.Tensor:
    """`clip_losses` in PyTorch, on any device."""
    weight_OBS = weight_OI.unflatten(1, (len(grams_BSS), -1))
    losses_COB = torch.empty_like(candidates.scales)
    for loss_OB, scales_OB, zeros_OB in zip(losses_COB, candidates.scales, candidates.zero_points, strict=True):
        block = (scales_OB.unsqueeze(-1), zeros_OB.unsqueeze(-1), levels)
        rounded_OBS = weights_of_codes(nearest_codes(weight_OBS, *block), *block)
        difference_BOS = rounded_OBS.sub_(weight_OBS).transpose(0, 1)
        loss_OB.copy_(torch.bmm(difference_BOS, grams_BSS).mul_(difference_BOS).sum(2).T)
    return losses_COB
