"""Following the quantized model's inputs: against ridge regression on the tokens themselves, and what it promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsquant.presets import PRESET_STEPS
from dsquant.quantization import pairs
from dsquant.quantization.clip import clipped_weight
from dsquant.quantization.compensate import compensated_weight
from dsquant.quantization.pairs import DRIFT_DAMPING, PairStatistics
from dsquant.schemes import Grid, round_to_nearest

SEED = 5
BEST = PRESET_STEPS["best"]


def _inputs(num_tokens: int, num_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs in the original, and with an error that depends on them."""
    generator = torch.Generator().manual_seed(SEED)
    mixing_II, error_II = (torch.randn(num_features, num_features, generator=generator) for _ in range(2))
    original_RI = torch.randn(num_tokens, num_features, generator=generator) @ mixing_II / num_features**0.5
    noise_RI = torch.randn(num_tokens, num_features, generator=generator)
    return original_RI, original_RI + 0.2 * original_RI @ error_II / num_features**0.5 + 0.05 * noise_RI


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED + 1))


def _statistics(original_RI: torch.Tensor, quantized_RI: torch.Tensor) -> PairStatistics:
    statistics = PairStatistics(original_RI.shape[1], SEED)
    for part in zip(original_RI.split(100), quantized_RI.split(100), strict=True):
        statistics.add(*part)
    return statistics


def test_the_fitted_weight_is_ridge_regression_towards_the_original() -> None:
    original_RI, quantized_RI = _inputs(500, 64)
    weight_OI, moments = _weight(16, 64), _statistics(original_RI, quantized_RI).moments()
    inputs = quantized_RI.double().numpy()
    penalty = DRIFT_DAMPING * 64 / 500 * (inputs**2).mean() * 500
    stacked = np.concatenate([inputs, penalty**0.5 * np.eye(64)])
    weight = weight_OI.double().numpy()
    wanted = np.concatenate([original_RI.double().numpy() @ weight.T, penalty**0.5 * weight.T])
    solution = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    assert np.allclose(moments.fitted(weight_OI).numpy(), solution, atol=1e-4)


def test_where_hidden_states_lack_something_the_fitted_weight_aims_at_that_too() -> None:
    original_RI, quantized_RI = _inputs(500, 64)
    weight_OI, weights_R, scales_I = _weight(16, 64), torch.linspace(0.2, 2, 500), torch.linspace(0.5, 3, 64)
    lack_RO = 0.3 * original_RI @ _weight(16, 64).roll(1, 0).T + original_RI[:, :16].square()
    statistics = PairStatistics(64, SEED)
    for part in zip(*(whole.split(100) for whole in (original_RI, quantized_RI, weights_R, lack_RO)), strict=True):
        statistics.add(*part)
    found_OI = statistics.moments().divided(scales_I).fitted(weight_OI * scales_I)
    inputs = (quantized_RI / scales_I * weights_R.unsqueeze(1)).double().numpy()
    penalty = DRIFT_DAMPING * 64 / 500 * (inputs**2).mean() * 500
    weight = (weight_OI * scales_I).double().numpy()
    outputs = ((original_RI @ weight_OI.T + lack_RO) * weights_R.unsqueeze(1)).double().numpy()
    wanted = np.concatenate([outputs, penalty**0.5 * weight.T])
    stacked = np.concatenate([inputs, penalty**0.5 * np.eye(64)])
    assert np.allclose(found_OI.numpy(), np.linalg.lstsq(stacked, wanted, rcond=None)[0].T, atol=1e-3)


def test_few_tokens_of_wide_inputs_give_the_fit_that_their_sums_give() -> None:
    original_RI, quantized_RI = _inputs(300, 2304)
    weights_R, scales_I = torch.linspace(0.2, 2, 300), torch.linspace(0.5, 3, 2304)
    summed, kept = PairStatistics(2304, SEED), PairStatistics(2304, SEED, num_tokens=300)
    for statistics in (summed, kept):
        for part in zip(original_RI.split(200), quantized_RI.split(200), weights_R.split(200), strict=True):
            statistics.add(*part)
    of_sums, of_tokens = (found.moments().divided(scales_I) for found in (summed, kept))
    assert of_sums.tokens is None and of_tokens.drift_II is None
    weight_OI = _weight(16, 2304)
    wanted_OI = of_sums.fitted(weight_OI) - weight_OI
    change_OI = of_tokens.fitted(weight_OI) - weight_OI
    assert (change_OI - wanted_OI).norm() < 1e-4 * wanted_OI.norm()


@pytest.mark.parametrize(("num_features", "num_tokens"), [(2304, 1153), (256, 8), (8320, 8)])
def test_sums_are_kept_of_many_tokens_of_narrow_inputs_and_of_the_widest(num_features: int, num_tokens: int) -> None:
    statistics = PairStatistics(num_features, SEED, num_tokens=num_tokens)
    statistics.add(*_inputs(8, num_features))
    assert statistics.moments().tokens is None


def test_equal_inputs_leave_the_weight_as_it_is() -> None:
    original_RI, _ = _inputs(300, 64)
    weight_OI = _weight(8, 64)
    assert torch.equal(_statistics(original_RI, original_RI).moments().fitted(weight_OI), weight_OI)


def test_dividing_both_inputs_is_dividing_the_moments() -> None:
    original_RI, quantized_RI = _inputs(300, 64)
    scales_I = torch.linspace(0.5, 3, 64)
    divided = _statistics(original_RI, quantized_RI).moments().divided(scales_I)
    wanted = _statistics(original_RI / scales_I, quantized_RI / scales_I).moments()
    assert divided.drift_II is not None and wanted.drift_II is not None
    assert torch.allclose(divided.drift_II, wanted.drift_II, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(4, 64, True), Grid(4, 128, False)], ids=str)
def test_outputs_come_nearer_to_the_originals_on_unseen_tokens(grid: Grid) -> None:
    original_RI, quantized_RI = _inputs(4000, 128)
    weight_OI, seen, unseen = _weight(64, 128), slice(0, 2000), slice(2000, 4000)
    wanted_RO = original_RI[unseen] @ weight_OI.T

    def error(weight: torch.Tensor) -> float:
        return float((quantized_RI[unseen] @ weight.T - wanted_RO).square().sum())

    alone = _statistics(quantized_RI[seen], quantized_RI[seen]).moments().rounded([weight_OI], [grid], BEST)[0]
    moments = _statistics(original_RI[seen], quantized_RI[seen]).moments()
    assert error(moments.fitted(weight_OI)) < 0.5 * error(weight_OI)
    assert error(moments.rounded([weight_OI], [grid], BEST)[0].dequantize()) < 0.6 * error(alone.dequantize())


def test_wider_inputs_are_compensated_but_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, grid = _weight(8, 128), Grid(4, 64, True)
    assert bool(PairStatistics(128, SEED).moments().rounded([weight_OI], [grid], BEST)[0].dequantize().isfinite().all())
    monkeypatch.setattr(pairs, "WIDEST_PAIRS", 64)
    moments = _statistics(*_inputs(200, 128)).moments()
    assert moments.drift_II is None
    assert torch.equal(moments.fitted(weight_OI), weight_OI)
    wanted = compensated_weight(weight_OI, grid, moments.moments)
    assert not torch.equal(wanted.codes_OI, clipped_weight(weight_OI, grid, moments.moments).codes_OI)
    assert torch.equal(moments.rounded([weight_OI], [grid], BEST)[0].codes_OI, wanted.codes_OI)


def test_what_a_format_rounds_itself_is_not_fitted() -> None:
    original_RI, quantized_RI = _inputs(500, 64)
    statistics = PairStatistics(64, SEED)
    statistics.add(original_RI, quantized_RI)
    weight_OI, own = _weight(16, 64), Grid(8, 64, True)
    fitted, kept = statistics.moments().rounded([weight_OI, weight_OI], [own, replace(own, rounded=False)], ())
    assert torch.equal(kept.dequantize(), round_to_nearest(weight_OI, own).dequantize())
    assert not torch.equal(fitted.dequantize(), kept.dequantize())
