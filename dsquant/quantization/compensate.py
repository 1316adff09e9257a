"""Error-compensating rounding: what one column loses is made good in the columns that are rounded after it.

The update is GPTQ's (Frantar et al., arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of the inverse
Gram matrix, rounding column j with error e changes column k > j by -e / U_jj * U_jk, and costs (e / U_jj)^2 of output
error once all later columns have been changed. The AWQ scales are folded in before. Two things differ from the
reference implementation: columns are sorted by their input's energy inside their group, and groups by theirs, so that
no index has to be stored; and each group's range is shrunk (AWQ's clipping) by what costs least of that compensated
error.

Shape legend: O out features, I in features, G groups, S = group size, C shrinks, P = C * O.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.compensation import compensate_group
from dsquant.kernels.precision import fast_matmuls
from dsquant.quantization.clip import SHRINKS, clipped_weight
from dsquant.quantization.statistics import GPU_ELEMENTS_AT_ONCE, InputMoments
from dsquant.rounding import Grid, QuantizedWeight, stacked

# The Gram matrix's diagonal is raised by this share of its mean, for each feature over a token: of few tokens it knows
# little, and compensation would fit their noise (docs/decisions/0006).
DAMPING = 0.2
LEAST_DAMPING = 0.005
# Rows are rounded in parts of at most this many weights, times the number of shrinks.
ELEMENTS_AT_ONCE = 2**22


def compensated_weight(
    weight_OI: torch.Tensor, grid: Grid, moments: InputMoments, shrinks: Sequence[float] = SHRINKS
) -> QuantizedWeight:
    """Rounds a weight so that errors of different columns cancel in the output.

    Args:
        weight_OI: float32 [O, I].
        grid: the quantization grid.
        moments: the inputs' moments. Where they hold no whole Gram matrix (wide inputs), or no token, ranges are
            clipped and columns rounded each for itself: errors must not be hidden where a sketch is blind.
        shrinks: factors in (0, 1] on the range that the grid spans.

    Returns:
        The rounded weight, no row of which errs more than with clipping alone.
    """
    clipped = clipped_weight(weight_OI, grid, moments, shrinks)
    if moments.gram_II is None or not moments.count:
        return clipped
    order_I = _order(moments.gram_II.diagonal(), grid.group_size)
    damping = damping_of(len(order_I), moments.count)
    factor_II = _inverse_factor(moments.gram_II[order_I][:, order_I], damping)
    rows_at_once = rows_at_once_of(weight_OI)
    parts = zip(weight_OI.split(rows_at_once), clipped.split(rows_at_once), strict=True)
    return stacked([_better_rows(*part, moments, shrinks, order_I, factor_II) for part in parts])


def rows_at_once_of(weight_OI: torch.Tensor) -> int:
    """How many rows of a weight [O, I] are rounded together, which bounds what rounding takes beside it."""
    at_once = GPU_ELEMENTS_AT_ONCE if weight_OI.is_cuda else ELEMENTS_AT_ONCE
    return max(1, at_once // weight_OI.shape[1])


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


def _inverse_factor(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular float32 [I, I], with U^T U the inverse of the damped Gram matrix H.

    With H = V V^T and V upper triangular (the Cholesky factor of H with rows and columns in reverse order), U = V^-1.
    Where H is not finite U is not either, its losses compare as false, and rows stay clipped. Nothing here waits for a
    GPU.
    """
    damped_II = damped(gram_II.double(), damping)
    upper_II = torch.linalg.cholesky_ex(damped_II.flip(0, 1)).L.flip(0, 1)
    identity_II = torch.eye(len(upper_II), dtype=torch.float64, device=upper_II.device)
    return torch.linalg.solve_triangular(upper_II, identity_II, upper=True).float()


def _better_rows(
    weight_OI: torch.Tensor,
    clipped: QuantizedWeight,
    moments: InputMoments,
    shrinks: Sequence[float],
    order_I: torch.Tensor,
    factor_II: torch.Tensor,
) -> QuantizedWeight:
    """Each row compensated or clipped, whichever errs less."""
    with fast_matmuls(weight_OI.device):
        compensated = _compensate(weight_OI, clipped.grid, shrinks, order_I, factor_II)
        clipped_O, compensated_O = (moments.loss_O(part.difference(weight_OI)) for part in (clipped, compensated))
    return compensated.or_else(clipped, compensated_O < clipped_O)


def _compensate(
    weight_OI: torch.Tensor, grid: Grid, shrinks: Sequence[float], order_I: torch.Tensor, factor_II: torch.Tensor
) -> QuantizedWeight:
    size = grid.group_size
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
