"""Coordinate descent on one block: its scale, its zero point, then each column's level, each to its best value in turn.

With H the block's part of the Gram matrix, u = levels less zero point and R the half gradient of a row's error:

* the scale s of integers is best at s - (u R) / (u H u^T), the weighted least squares of that one number;
* their zero point moves by one, up or down, where that lowers the error: all the block's weights move by the scale;
* column j's best level is the nearest one to q_j - R_j / (H_jj s), and a change d of the weight changes R by
  d H_j (QuantEase, arXiv 2309.01885, algorithm 1).

Scales that a format stores with few bits, and offsets, stay as they are.

Shape legend: S columns of the block, O rows of the weight.
"""

import torch

from dsquant.kernels.grids import nearest_levels, storable_scales
from dsquant.kernels.values import DescendingBlock, Levels


def descend_block(
    block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """Moves a block's scales, zero points and levels to their best values, in place, one after the other.

    `gradient_SO` is R before, float32 and contiguous, and does not change; `gram_SS` is the block's part of H, float32
    and contiguous, its diagonal positive. Returns the change of each weight, float32 [S, O].
    """
    if gradient_SO.is_cuda:
        from dsquant.kernels import descent_triton

        return descent_triton.descend_block(block, gradient_SO, gram_SS, levels)
    return descend_block_reference(block, gradient_SO, gram_SS, levels)


def descend_block_reference(
    block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """`descend_block` in PyTorch, on any device."""
    before_SO = (block.levels_SO - block.zero_points_O) * block.scales_O
    gradient_SO = gradient_SO.clone()
    if levels.movable:
        _fit_scales(block, gradient_SO, gram_SS)
        if not levels.symmetric:
            _fit_zero_points(block, gradient_SO, gram_SS, levels.largest)
    _fit_levels(block, gradient_SO, gram_SS, levels)
    return (block.levels_SO - block.zero_points_O).mul_(block.scales_O).sub_(before_SO)


def _fit_scales(block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor) -> None:
    centred_SO = block.levels_SO - block.zero_points_O
    spread_SO = gram_SS @ centred_SO
    curvature_O, slope_O = (spread_SO * centred_SO).sum(0), (gradient_SO * centred_SO).sum(0)
    wanted_O = block.scales_O - slope_O / torch.where(curvature_O > 0, curvature_O, 1.0)
    change_O = storable_scales(wanted_O) - block.scales_O
    falls_O = (curvature_O > 0) & (2 * change_O * slope_O + change_O.square() * curvature_O < 0)
    change_O = torch.where(falls_O, change_O, 0.0)
    block.scales_O.add_(change_O)
    gradient_SO.addcmul_(spread_SO, change_O)


def _fit_zero_points(block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, largest: int) -> None:
    spread_S = gram_SS.sum(1)
    curvature = spread_S.sum()
    for step in (1.0, -1.0):
        change_O, moved_O = -step * block.scales_O, block.zero_points_O + step
        gain_O = 2 * change_O * gradient_SO.sum(0) + change_O.square() * curvature
        falls_O = (gain_O < 0) & (moved_O >= 0) & (moved_O <= largest)
        block.zero_points_O.copy_(torch.where(falls_O, moved_O, block.zero_points_O))
        gradient_SO.addr_(spread_S, torch.where(falls_O, change_O, 0.0))


def _fit_levels(block: DescendingBlock, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, levels: Levels) -> None:
    levels_SO, scales_O = block.levels_SO, block.scales_O
    divisors_O = torch.where(scales_O != 0, scales_O, torch.inf)
    steps_S = gram_SS.diagonal().reciprocal()
    for column in range(len(levels_SO)):
        wanted_O = levels_SO[column] - gradient_SO[column] * steps_S[column] / divisors_O
        new_O = nearest_levels(wanted_O, levels)
        gradient_SO[column:].addr_(gram_SS[column, column:], (new_O - levels_SO[column]).mul_(scales_O))
        levels_SO[column] = new_O
