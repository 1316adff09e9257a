"""Weight errors are those of rounding: what was folded is undone, what was forgotten shows."""

from pathlib import Path

import pytest
import torch

from dsquant.evaluation.results import WeightError
from dsquant.evaluation.weight_errors import LayerComparison, Moments, error_sums, module_kind
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import Fold, FoldedWeights
from dsquant.model.skeleton import Skeleton


def folded(pico_r1: Path, forget_router: bool = False) -> tuple[list[WeightError], Skeleton]:
    """Every error of a layer into whose norms and projections random scales are folded."""
    checkpoint = open_checkpoint(pico_r1)
    skeleton = Skeleton(checkpoint)
    layer, weights, fold = skeleton.layers[2], checkpoint.weights, Fold()
    generator = torch.Generator().manual_seed(0)

    def put(producer: str, consumers: list[str], rows: tuple[int, ...] | None = None) -> None:
        scales = torch.exp(torch.randn(weights.shape(consumers[0])[1], generator=generator))
        full = torch.ones(weights.shape(producer)[0])
        full[list(rows or range(len(full)))] = 1 / scales
        fold.rows[producer] = full
        fold.columns |= dict.fromkeys(consumers, scales)

    for group in layer.attention:
        put(f"{group.producer}.weight", [f"{name}.weight" for name in group.consumers], group.producer_rows)
    assert layer.router is not None
    inputs = [f"{name}.weight" for mlp in layer.mlps for name in (mlp.gate, mlp.up)]
    put(f"{layer.norm}.weight", inputs if forget_router else [*inputs, layer.router])
    for mlp in layer.mlps:
        put(f"{mlp.up}.weight", [f"{mlp.down}.weight"])
    candidate, comparison = FoldedWeights(weights, fold), LayerComparison(layer)
    comparison.dense_part(weights, candidate, {})
    for mlp in layer.experts:
        comparison.sums += comparison.of_mlp(
            mlp, GatedWeights.read(weights, mlp), GatedWeights.read(candidate, mlp), {}
        )
    return [one.error() for one in comparison.sums], skeleton


def test_folding_alone_is_no_error(pico_r1: Path) -> None:
    errors, _ = folded(pico_r1)
    names = {error.name for error in errors}
    assert len(names) == len(errors) == 5 + 2 + 3 * 9
    assert max(error.relative for error in errors) < 1e-5


def test_a_router_left_out_of_the_folding_shows(pico_r1: Path) -> None:
    errors, skeleton = folded(pico_r1, forget_router=True)
    worst = max(errors, key=lambda error: error.relative)
    assert worst.name == skeleton.layers[2].router and worst.relative > 0.5
    assert sorted(error.relative for error in errors)[-2] < 1e-5


def test_errors_weigh_columns_by_what_reaches_them() -> None:
    original, candidate, moments = torch.ones(4, 2), torch.tensor([[1.0, 2.0]]).repeat(4, 1), Moments()
    moments.add(torch.tensor([[3.0, 0.0], [1.0, 0.1]]))
    found = error_sums("w", 0, original, candidate, moments).error()
    assert found.relative == pytest.approx(0.5**0.5)
    assert found.activation_weighted == pytest.approx((0.01 / 10.01) ** 0.5)
    assert error_sums("w", 0, original, torch.zeros(4, 2)).error().relative == 1
    assert error_sums("w", 0, torch.zeros(2), torch.zeros(2)).error().relative == 0
    assert error_sums("w", 0, torch.zeros(2), torch.ones(2)).error().relative == float("inf")
    assert error_sums("w", 0, torch.ones(2), torch.tensor([1, float("nan")])).error().relative == float("inf")


def test_kinds_have_no_numbers() -> None:
    assert module_kind("model.layers.3.mlp.experts.17.down_proj.weight") == "mlp.experts.down_proj"
    assert module_kind("model.layers.12.mlp.gate.e_score_correction_bias") == "mlp.gate.e_score_correction_bias"
    assert module_kind("lm_head.weight") == "lm_head"
