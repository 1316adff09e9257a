"""Rounds the rows of a weight so that their errors cancel in what the model predicts.

With A the metric of the outputs (`output_metrics`), H the Gram matrix of the inputs and D the error, tr(A D H D^T) is
to be low. Rows are rounded in `GROUPS` groups one after the other, each of every eighth row. A group is rounded towards
what compensates best for the errors of the groups before it, as GPTQ compensates errors of columns (Frantar et al.,
arXiv 2210.17323; of rows too: YAQA, Tseng et al., arXiv 2505.22988). What rows of one group do to each other is left
out.

Shape legend: O out features, I in features, R rows of a group.
"""

from collections.abc import Callable

import torch

from dsquant.schemes import QuantizedWeight, stacked

GROUPS = 8
# The metric's diagonal is raised by this share of its mean: it is an estimate from few tokens.
DAMPING = 0.5


def rounded_together(
    wanted_OI: torch.Tensor, metric_OO: torch.Tensor, rounded: Callable[[torch.Tensor], QuantizedWeight]
) -> QuantizedWeight:
    """Rounds a weight, float32 [O, I], by groups of rows; `rounded` rounds a group [R, I] by itself.

    The metric is float32 [O, O]. Where it is zero or not finite, all rows are rounded by themselves.
    """
    num_rows = len(wanted_OI)
    groups = [torch.arange(first, num_rows, GROUPS) for first in range(min(GROUPS, num_rows))]
    order_O = torch.cat(groups).to(wanted_OI.device)
    factor_OO = _inverse_factor(metric_OO[order_O][:, order_O])
    if factor_OO is None:
        return rounded(wanted_OI)
    targets_OI, start = wanted_OI[order_O], 0
    parts: list[QuantizedWeight] = []
    for rows_R in groups:
        stop = start + len(rows_R)
        parts.append(rounded(targets_OI[start:stop]))
        own_RR, others_RO = factor_OO[start:stop].tensor_split([start, stop], dim=1)[1:]
        passed_on_RO = torch.linalg.solve_triangular(own_RR, others_RO, upper=True).float()
        targets_OI[stop:] += passed_on_RO.T @ parts[-1].difference(targets_OI[start:stop])
        start = stop
    return stacked(parts).rows(order_O.argsort())


def _inverse_factor(metric_OO: torch.Tensor) -> torch.Tensor | None:
    """Returns U, float64 and upper triangular, with U^T U the inverse of the damped metric.

    None where the metric is zero or not finite.
    """
    damped_OO = metric_OO.double()
    mean = damped_OO.diagonal().mean()
    if not (mean.isfinite() and mean > 0):
        return None
    damped_OO.diagonal().add_(DAMPING * mean)
    lower_OO, failed = torch.linalg.cholesky_ex(damped_OO)
    if failed:
        return None
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_OO), upper=True)
