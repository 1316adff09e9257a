"""Error-compensating rounding: what one column loses is made good in the columns that are rounded after it.

The update is GPTQ's (Frantar et al., arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of the inverse
Gram matrix, rounding column j with error e changes column k > j by -e / U_jj * U_jk, and costs (e / U_jj)^2 of output
error once all later columns have been changed. The AWQ scales are folded in before. Two things differ from the
reference implementation: columns are sorted by their input's energy inside their group, and groups by theirs, so that
no index has to be stored; and each group's range is shrunk (AWQ's clipping) by what costs least of that compensated
error.

Inputs wider than a Gram matrix is kept of are compensated in parts, or by a matrix that their layer shares
(docs/decisions/0018).

Shape legend: O out features, I in features, G groups, S = group size, C shrinks, P = C * O.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsquant.kernels.compensation import compensate_group
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.threads import side_by_side
from dsquant.quantization.clip import PARTS_AT_ONCE, SHRINKS, clipped_weight, rows_of_part
from dsquant.quantization.statistics import InputMoments, InverseFactor
from dsquant.schemes import Grid, QuantizedWeight, joined, stacked

# The Gram matrix's diagonal is raised by this share of its mean, for each feature over a token: of few tokens it knows
# little, and compensation would fit their noise (docs/decisions/0006).
DAMPING = 0.2
LEAST_DAMPING = 0.005


def compensated_weight(
    weight_OI: torch.Tensor, grid: Grid, moments: InputMoments, shrinks: Sequence[float] = SHRINKS
) -> QuantizedWeight:
    """Rounds a weight so that errors of different columns cancel in the output.

    Args:
        weight_OI: float32 [O, I].
        grid: the quantization grid.
        moments: the inputs' moments. Where they hold neither Gram matrices nor `inverses`, or no token, ranges are
            clipped and columns rounded each for itself: errors must not be hidden where a sketch is blind.
        shrinks: factors in (0, 1] on the range that the grid spans.

    Returns:
        The rounded weight, no row of which errs more than with clipping alone, as the moments estimate it.
    """
    clipped = clipped_weight(weight_OI, grid, moments, shrinks)
    inverses = with_inverses(moments, grid.group_size).inverses
    if not inverses or not moments.count:
        return clipped
    num_rows = rows_of_part(weight_OI)
    parts = zip(weight_OI.split(num_rows), clipped.split(num_rows), strict=True)
    return stacked(side_by_side(lambda part: _better_rows(*part, moments, shrinks, inverses), parts, PARTS_AT_ONCE))


def with_inverses(moments: InputMoments, group_size: int) -> InputMoments:
    """Makes what compensation takes of the Gram matrices, once for all weights that read these inputs.

    Args:
        moments: the inputs' moments.
        group_size: of the grid.

    Returns:
        The same with `inverses`; as they are where they have them, hold no Gram matrix, or no token.
    """
    grams = moments.parts_PWW if moments.gram_II is None else [moments.gram_II]
    if moments.inverses or grams is None or not moments.count:
        return moments
    damping = damping_of(len(grams[0]), moments.count)
    return replace(moments, inverses=tuple(_inverse(gram_II, group_size, damping) for gram_II in grams))


def damping_of(num_features: int, num_tokens: int) -> float:
    """The share of the Gram matrix's mean diagonal by which the diagonal is raised."""
    return max(LEAST_DAMPING, DAMPING * num_features / num_tokens)


def damped(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """Raises a Gram matrix's diagonal by a share of its mean, in place; by the share itself where all is zero."""
    mean = gram_II.diagonal().mean()
    gram_II.diagonal().add_(damping * torch.where(mean > 0, mean, 1.0))
    return gram_II


def _order(energy_I: torch.Tensor, group_size: int) -> torch.Tensor:
    """The columns in the order of rounding, int64 [I]: whole groups, the most energetic first, and so inside each."""
    energy_GS = energy_I.unflatten(0, (-1, group_size))
    inside_GS = energy_GS.argsort(dim=1, descending=True, stable=True)
    groups_G = energy_GS.sum(1).argsort(dim=0, descending=True, stable=True)
    first_G1 = group_size * torch.arange(len(groups_G), device=energy_I.device).unsqueeze(1)
    return (inside_GS + first_G1)[groups_G].flatten()


def _inverse(gram_II: torch.Tensor, group_size: int, damping: float) -> InverseFactor:
    """The order of rounding, and U with U^T U the inverse of the damped Gram matrix H in that order.

    With H = V V^T and V upper triangular (the Cholesky factor of H with rows and columns in reverse order), U = V^-1.
    Where H is not finite U is not either, its losses compare as false, and rows stay clipped. Nothing here waits for a
    GPU.
    """
    order_I = _order(gram_II.diagonal(), group_size)
    reverse_I = order_I.flip(0)
    upper_II = torch.linalg.cholesky_ex(damped(gram_II[reverse_I][:, reverse_I].double(), damping)).L.flip(0, 1)
    identity_II = torch.eye(len(upper_II), dtype=torch.float64, device=upper_II.device)
    return InverseFactor(order_I, torch.linalg.solve_triangular(upper_II, identity_II, upper=True).float())


def _better_rows(
    weight_OI: torch.Tensor,
    clipped: QuantizedWeight,
    moments: InputMoments,
    shrinks: Sequence[float],
    inverses: Sequence[InverseFactor],
) -> QuantizedWeight:
    """Each row compensated or clipped, whichever errs less."""
    with fast_matmuls(weight_OI.device):
        parts = zip(weight_OI.split(len(inverses[0].order_I), dim=1), inverses, strict=True)
        compensated = joined([_compensate(part_OI, clipped.grid, shrinks, inverse) for part_OI, inverse in parts])
        clipped_O, compensated_O = (moments.loss_O(part.difference(weight_OI)) for part in (clipped, compensated))
    return compensated.or_else(clipped, compensated_O < clipped_O)


def _compensate(
    weight_OI: torch.Tensor, grid: Grid, shrinks: Sequence[float], inverse: InverseFactor
) -> QuantizedWeight:
    size, order_I, factor_II = grid.group_size, inverse.order_I, inverse.factor_II
    working_IO = weight_OI[:, order_I].T.contiguous()
    groups = []
    for start in range(0, len(working_IO), size):
        stop = start + size
        factor_SS = factor_II[start:stop, start:stop]
        groups.append(compensate_group(working_IO[start:stop], factor_SS, shrinks, grid.bits, grid.symmetric))
        working_IO[stop:].addmm_(factor_II[start:stop, stop:].T, groups[-1].errors_SO, alpha=-1)
    place_I, place_G = order_I.argsort(), (order_I[::size] // size).argsort()
    return QuantizedWeight(
        torch.cat([group.codes_SO for group in groups])[place_I].T.contiguous(),
        torch.stack([group.scales_O for group in groups])[place_G].T.contiguous(),
        torch.stack([group.zero_points_O for group in groups])[place_G].T.contiguous(),
        grid,
    )
