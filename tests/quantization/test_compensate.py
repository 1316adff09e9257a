"""Error-compensating rounding: against a plain column-by-column reference, and what it promises."""

import numpy as np
import pytest
import torch

from dsquant.quantization.clip import clipped_weight
from dsquant.quantization.compensate import DAMPING, LEAST_DAMPING, SHRINKAGE, compensated_weight
from dsquant.quantization.mlp_inputs import FEWEST_TOKENS
from dsquant.quantization.statistics import WIDEST_GRAM, InputMoments, InputStatistics
from dsquant.schemes import Grid

SEED = 7


def _moments(num_features: int, num_tokens: int, correlated: bool = True) -> InputMoments:
    generator = torch.Generator().manual_seed(SEED)
    mixing_II = torch.randn(num_features, num_features, generator=generator) / num_features**0.5
    inputs_RI = torch.randn(num_tokens, num_features, generator=generator)
    if correlated:
        inputs_RI = inputs_RI @ mixing_II
    inputs_RI[:, ::17] *= 8
    statistics = InputStatistics(num_features, SEED)
    statistics.add(inputs_RI)
    return statistics.moments()


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED + 1))


def _gptq(weight_OI: torch.Tensor, grid: Grid, moments: InputMoments) -> np.ndarray:
    """GPTQ one row, one clip ratio and one column at a time, in float64, by the inverse's own downdate."""
    assert moments.gram_II is not None
    gram = moments.gram_II.double().numpy()
    size, num = grid.group_size, len(gram)
    gram = np.where(np.eye(num) > 0, gram, (1 - SHRINKAGE) * gram)
    gram = gram + np.eye(num) * gram.diagonal().mean() * max(LEAST_DAMPING, DAMPING * num / moments.count)
    energy = moments.gram_II.diagonal().numpy()
    groups = sorted(range(num // size), key=lambda group: -energy[group * size : (group + 1) * size].sum())
    order = [
        group * size + column
        for group in groups
        for column in np.argsort(-energy[group * size : (group + 1) * size], kind="stable")
    ]
    result = np.zeros(weight_OI.shape)
    for row, original in enumerate(weight_OI.double().numpy()):
        values, inverse = original[order].copy(), np.linalg.inv(gram[np.ix_(order, order)])
        for start in range(0, num, size):
            group = torch.tensor(values[start : start + size], dtype=torch.float32).unsqueeze(0)
            best = None
            candidates = grid.parameters(group, grid.clip_ratios)
            for scale, zero in zip(
                candidates.scales.flatten().tolist(), candidates.zero_points.flatten().tolist(), strict=True
            ):
                tried, downdated, cost = values.copy(), inverse.copy(), 0.0
                for column in range(start, start + size):
                    code = np.clip(np.round(tried[column] / scale) + zero, 0, grid.maximum_code)
                    error = tried[column] - (code - zero) * scale
                    row_of_inverse = downdated[column] / downdated[column, column]
                    cost += error**2 / downdated[column, column]
                    tried[column + 1 :] -= error * row_of_inverse[column + 1 :]
                    tried[column] -= error
                    downdated -= np.outer(downdated[:, column], row_of_inverse)
                    downdated[column, column] = 1.0
                if best is None or cost < best[0]:
                    best = cost, tried, downdated
            assert best is not None
            _, values, inverse = best
        result[row, order] = values
    return result


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(4, 32, False), Grid(3, 64, True)])
def test_blocked_compensation_equals_gptq_column_by_column(grid: Grid) -> None:
    weight_OI, moments = _weight(12, 128), _moments(128, 4096)
    found = compensated_weight(weight_OI, grid, moments).dequantize()
    wanted = torch.tensor(_gptq(weight_OI, grid, moments), dtype=torch.float32)
    same_rows = ((found - wanted).abs().amax(1) < 1e-5).double().mean()
    assert same_rows > 0.8  # a tie between two ratios may fall the other way in float32
    assert float(moments.loss(found - weight_OI)) == pytest.approx(float(moments.loss(wanted - weight_OI)), rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compensation_halves_the_error_where_inputs_are_correlated(symmetric: bool) -> None:
    weight_OI, moments, grid = _weight(64, 256), _moments(256, 4096), Grid(4, 128, symmetric)
    clipped = moments.loss(clipped_weight(weight_OI, grid, moments).dequantize() - weight_OI)
    compensated = moments.loss(compensated_weight(weight_OI, grid, moments).dequantize() - weight_OI)
    assert compensated < 0.6 * clipped


@pytest.mark.parametrize("tokens", [3, 40, 4096])
def test_no_row_errs_more_than_with_clipping_alone(tokens: int) -> None:
    weight_OI, moments, grid = _weight(64, 256), _moments(256, tokens, correlated=False), Grid(4, 64, False)
    clipped_O = moments.loss_O(clipped_weight(weight_OI, grid, moments).dequantize() - weight_OI)
    found_O = moments.loss_O(compensated_weight(weight_OI, grid, moments).dequantize() - weight_OI)
    assert bool((found_O <= clipped_O).all())


@pytest.mark.parametrize(("correlated", "bound"), [(True, 1.0), (False, 1.25)])
def test_few_tokens_mislead_unseen_inputs_little(correlated: bool, bound: float) -> None:
    weight_OI, grid = _weight(64, 256), Grid(4, 128, True)
    few, many = _moments(256, FEWEST_TOKENS, correlated), _moments(256, 16384, correlated)
    clipped = many.loss(clipped_weight(weight_OI, grid, few).dequantize() - weight_OI)
    compensated = many.loss(compensated_weight(weight_OI, grid, few).dequantize() - weight_OI)
    assert compensated < bound * clipped


def test_inputs_without_a_whole_gram_matrix_are_clipped_only() -> None:
    columns = WIDEST_GRAM + 128
    weight_OI, moments, grid = _weight(4, columns), _moments(columns, 64, correlated=False), Grid()
    assert moments.gram_II is None
    found, clipped = compensated_weight(weight_OI, grid, moments), clipped_weight(weight_OI, grid, moments)
    assert torch.equal(found.codes_OI, clipped.codes_OI)


def test_no_token_and_dead_channels_are_harmless() -> None:
    weight_OI, grid = _weight(8, 128), Grid()
    nothing = InputStatistics(128, SEED).moments()
    assert bool(compensated_weight(weight_OI, grid, nothing).dequantize().isfinite().all())
    statistics = InputStatistics(128, SEED)
    inputs_RI = torch.randn(512, 128, generator=torch.Generator().manual_seed(SEED))
    inputs_RI[:, 5:90] = 0
    statistics.add(inputs_RI)
    found = compensated_weight(weight_OI, grid, statistics.moments()).dequantize()
    assert bool(found.isfinite().all())
    # a channel that no token uses is rounded to its nearest point all the same
    scale_OI = compensated_weight(weight_OI, grid, statistics.moments()).scales_OG.repeat_interleave(128, 1)
    inside_OI = (weight_OI.abs() < 2 * scale_OI.abs()) & (torch.arange(128) >= 5) & (torch.arange(128) < 90)
    assert bool(((found - weight_OI).abs()[inside_OI] <= scale_OI[inside_OI] * 0.501).all())


def test_every_row_part_is_rounded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, moments, grid = _weight(40, 256), _moments(256, 2048), Grid(4, 128, False)
    whole = compensated_weight(weight_OI, grid, moments)
    monkeypatch.setattr("dsquant.quantization.clip.ELEMENTS_AT_ONCE", 4 * 256 * 7)
    parts = compensated_weight(weight_OI, grid, moments)
    same = (whole.codes_OI == parts.codes_OI).all(1).double().mean()
    assert same > 0.95  # products of other widths may sum in another order
