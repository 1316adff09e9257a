"""Coordinate descent on one group: its scale, its zero point, then each column's code, each to its best value in turn.

With H the group's block of the Gram matrix, u = codes less zero point and R the half gradient of a row's error:

* the scale s is best at s - (u R) / (u H u^T), the weighted least squares of that one number;
* the zero point moves by one, up or down, where that lowers the error: all the group's weights move by the scale;
* column j's best code is the nearest grid point to q_j - R_j / (H_jj s), and a change d of the weight changes R by
  d H_j (QuantEase, arXiv 2309.01885, algorithm 1).

Shape legend: S columns of the group, O rows of the weight.
"""

import torch

from dsquant.kernels.grids import storable_scales
from dsquant.kernels.values import DescendingGroup


def descend_group(
    group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, maximum_code: int, symmetric: bool
) -> torch.Tensor:
    """Moves a group's scales, zero points and codes to their best values, one after the other.

    Args:
        group: overwritten with what is found.
        gradient_SO: float32 [S, O], R before; not changed.
        gram_SS: float32 [S, S], the group's block of H, its diagonal positive.
        maximum_code: the largest code.
        symmetric: whether zero points stay as they are.

    Returns:
        What each weight changed by, float32 [S, O].
    """
    if gradient_SO.is_cuda:
        from dsquant.kernels import descent_triton

        return descent_triton.descend_group(group, gradient_SO, gram_SS, maximum_code, symmetric)
    return descend_group_reference(group, gradient_SO, gram_SS, maximum_code, symmetric)


def descend_group_reference(
    group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, maximum_code: int, symmetric: bool
) -> torch.Tensor:
    """`descend_group` in PyTorch, on any device.

    Args:
        group: as for `descend_group`.
        gradient_SO: as for `descend_group`.
        gram_SS: as for `descend_group`.
        maximum_code: as for `descend_group`.
        symmetric: as for `descend_group`.

    Returns:
        As `descend_group`.
    """
    before_SO = (group.codes_SO - group.zero_points_O) * group.scales_O
    gradient_SO = gradient_SO.clone()
    _fit_scales(group, gradient_SO, gram_SS)
    if not symmetric:
        _fit_zero_points(group, gradient_SO, gram_SS, maximum_code)
    _fit_codes(group, gradient_SO, gram_SS, maximum_code)
    return (group.codes_SO - group.zero_points_O).mul_(group.scales_O).sub_(before_SO)


def _fit_scales(group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor) -> None:
    centred_SO = group.codes_SO - group.zero_points_O
    spread_SO = gram_SS @ centred_SO
    curvature_O, slope_O = (spread_SO * centred_SO).sum(0), (gradient_SO * centred_SO).sum(0)
    wanted_O = group.scales_O - slope_O / torch.where(curvature_O > 0, curvature_O, 1.0)
    change_O = storable_scales(wanted_O) - group.scales_O
    falls_O = (curvature_O > 0) & (2 * change_O * slope_O + change_O.square() * curvature_O < 0)
    change_O = torch.where(falls_O, change_O, 0.0)
    group.scales_O.add_(change_O)
    gradient_SO.addcmul_(spread_SO, change_O)


def _fit_zero_points(
    group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, maximum_code: int
) -> None:
    spread_S = gram_SS.sum(1)
    curvature = spread_S.sum()
    for step in (1.0, -1.0):
        change_O, moved_O = -step * group.scales_O, group.zero_points_O + step
        gain_O = 2 * change_O * gradient_SO.sum(0) + change_O.square() * curvature
        falls_O = (gain_O < 0) & (moved_O >= 0) & (moved_O <= maximum_code)
        group.zero_points_O.copy_(torch.where(falls_O, moved_O, group.zero_points_O))
        gradient_SO.addr_(spread_S, torch.where(falls_O, change_O, 0.0))


def _fit_codes(group: DescendingGroup, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, maximum_code: int) -> None:
    codes_SO, scales_O = group.codes_SO, group.scales_O
    steps_S = gram_SS.diagonal().reciprocal()
    for column in range(len(codes_SO)):
        wanted_O = codes_SO[column] - gradient_SO[column] * steps_S[column] / scales_O
        new_O = wanted_O.round_().clamp_(0, maximum_code)
        gradient_SO[column:].addr_(gram_SS[column, column:], (new_O - codes_SO[column]).mul_(scales_O))
        codes_SO[column] = new_O
