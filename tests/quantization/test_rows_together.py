"""Rows that are rounded together err so that their errors cancel in what the model predicts."""

from functools import partial

import pytest
import torch
from linear_inputs import correlated, moments_of

from dsquant.quantization.rows_together import DAMPING, GROUPS, rounded_together
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid, QuantizedWeight

GRID = Grid(4, 32, symmetric=True)


def rounding(steps: tuple[str, ...]) -> partial[QuantizedWeight]:
    return partial(rounded_weight, grid=GRID, moments=moments_of(correlated(512, 128, 3)), steps=steps)


def metric(num_rows: int, tokens: int = 512) -> torch.Tensor:
    gradients = correlated(tokens, num_rows, 7)
    return gradients.T @ gradients / tokens


def weight(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_rows", [1, 5, 8, 40])
def test_each_group_is_rounded_towards_the_best_answer_to_the_errors_before_it(num_rows: int) -> None:
    """The best answer of rows that are still free: with A the damped metric, minus A_ff^-1 A_fd D_d."""
    wanted_OI, metric_OO = weight(num_rows), metric(num_rows)
    targets: list[torch.Tensor] = []

    def watched(target_RI: torch.Tensor) -> QuantizedWeight:
        targets.append(target_RI.clone())
        return rounding(())(target_RI)

    found = rounded_together(wanted_OI, metric_OO, watched)
    damped_OO = metric_OO.double() + DAMPING * metric_OO.diagonal().mean() * torch.eye(num_rows)
    error_OI = found.difference(wanted_OI).double()
    groups = [torch.arange(first, num_rows, GROUPS) for first in range(min(GROUPS, num_rows))]
    assert len(targets) == len(groups)
    for place, rows_R in enumerate(groups):
        free = torch.cat(groups[place:])
        done = torch.cat([*groups[:place], torch.empty(0, dtype=torch.long)])
        answer = -torch.linalg.solve(damped_OO[free][:, free], damped_OO[free][:, done] @ error_OI[done])
        assert torch.allclose(targets[place], wanted_OI[rows_R] + answer[: len(rows_R)].float(), atol=1e-5)


def test_what_the_errors_do_together_falls_by_a_tenth() -> None:
    wanted_OI, metric_OO = weight(64), metric(64)
    moments = moments_of(correlated(512, 128, 3))
    assert moments.gram_II is not None
    for steps in ((), ("clip", "compensate", "descend")):
        alone = rounding(steps)(wanted_OI).difference(wanted_OI)
        together = rounded_together(wanted_OI, metric_OO, rounding(steps)).difference(wanted_OI)
        costs = [float(((metric_OO @ one) * (one @ moments.gram_II)).sum()) for one in (together, alone)]
        assert costs[0] < 0.9 * costs[1], steps


@pytest.mark.parametrize("hopeless", [0.0, float("nan"), float("inf")])
def test_a_metric_that_says_nothing_leaves_rows_to_themselves(hopeless: float) -> None:
    wanted_OI = weight(20)
    found = rounded_together(wanted_OI, torch.full((20, 20), hopeless), rounding(("clip", "compensate")))
    alone = rounding(("clip", "compensate"))(wanted_OI)
    assert torch.equal(found.codes_OI, alone.codes_OI) and torch.equal(found.scales_OG, alone.scales_OG)


def test_rows_that_do_not_meet_in_the_metric_are_rounded_as_by_themselves() -> None:
    wanted_OI = weight(20)
    diagonal_OO = torch.diag(torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1)
    found = rounded_together(wanted_OI, diagonal_OO, rounding(("clip", "compensate", "descend")))
    assert torch.equal(found.codes_OI, rounding(("clip", "compensate", "descend"))(wanted_OI).codes_OI)
