"""Coordinate descent after rounding: against a plain loop over numbers, and what it promises."""

import numpy as np
import pytest
import torch

from dsquant.kernels.grids import storable_scales
from dsquant.quantization import descend
from dsquant.quantization.compensate import compensated_weight
from dsquant.quantization.descend import descended_weight
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest

SEED = 11


def _moments(num_features: int, num_tokens: int) -> InputMoments:
    generator = torch.Generator().manual_seed(SEED)
    mixing_II = torch.randn(num_features, num_features, generator=generator) / num_features**0.5
    statistics = InputStatistics(num_features, SEED)
    statistics.add(torch.randn(num_tokens, num_features, generator=generator) @ mixing_II)
    return statistics.moments()


def _gram(num_features: int, num_tokens: int = 400) -> torch.Tensor:
    gram_II = _moments(num_features, num_tokens).gram_II
    assert gram_II is not None
    return gram_II + 0.01 * gram_II.diagonal().mean() * torch.eye(num_features)


def _weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED + 1))


def _losses(weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    difference_OI = weight.difference(wanted_OI).double()
    return ((difference_OI @ gram_II.double()) * difference_OI).sum(1)


def _one_sweep(weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> list[np.ndarray]:
    """One row, one number at a time, every loss computed from scratch in float64."""
    grid, gram, size = weight.grid, gram_II.double().numpy(), weight.grid.group_size
    codes = weight.codes_OI.double().numpy()
    scales, zeros = (part.double().numpy().copy() for part in (weight.scales_OG, weight.zero_points_OG))
    for row, wanted in enumerate(wanted_OI.double().numpy()):
        code, scale, zero = codes[row], scales[row], zeros[row]

        def difference(code: np.ndarray, scale: np.ndarray, zero: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            return (code - zero.repeat(size)) * scale.repeat(size) - wanted

        def loss(code: np.ndarray, scale: np.ndarray, zero: np.ndarray, wanted: np.ndarray = wanted) -> float:
            error = difference(code, scale, zero, wanted)
            return float(error @ gram @ error)

        for group in range(len(scale)):
            direction = np.zeros_like(wanted)
            columns = slice(group * size, (group + 1) * size)
            direction[columns] = code[columns] - zero[group]
            step = direction @ gram @ difference(code, scale, zero, wanted) / (direction @ gram @ direction)
            tried = scale.copy()
            tried[group] = float(storable_scales(torch.tensor(scale[group] - step, dtype=torch.float32)))
            if loss(code, tried, zero) < loss(code, scale, zero):
                scale[:] = tried
            for move in (1, -1) if not grid.symmetric else ():
                tried = zero.copy()
                tried[group] += move
                inside = 0 <= tried[group] <= grid.maximum_code
                if inside and loss(code, scale, tried) < loss(code, scale, zero):
                    zero[:] = tried
            for column in range(group * size, (group + 1) * size):
                gradient = gram[column] @ difference(code, scale, zero, wanted)
                best = code[column] - gradient / gram[column, column] / scale[group]
                code[column] = np.clip(np.round(best), 0, grid.maximum_code)
    return [codes, scales, zeros]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("near", [32, 64, 1024])
def test_a_sweep_moves_one_number_after_the_other_to_its_best_value(
    near: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descend, "SWEEPS", 1)
    monkeypatch.setattr(descend, "NEAR", near)
    grid, gram_II, wanted_OI = Grid(4, 32, symmetric), _gram(96), _weight(8, 96)
    start = round_to_nearest(wanted_OI, grid)
    found = descended_weight(start, wanted_OI, gram_II)
    codes, scales, zeros = _one_sweep(start, wanted_OI, gram_II)
    assert np.array_equal(found.scales_OG.numpy(), scales.astype(np.float32))
    assert np.array_equal(found.zero_points_OG.numpy(), zeros)
    assert np.array_equal(found.codes_OI.numpy(), codes)


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(4, 128, False), Grid(3, 64, True)], ids=str)
def test_no_row_loses_and_most_gain_on_what_compensation_leaves(grid: Grid) -> None:
    moments, wanted_OI = _moments(256, 2000), _weight(64, 256)
    assert moments.gram_II is not None
    start = compensated_weight(wanted_OI, grid, moments)
    found = descended_weight(start, wanted_OI, moments.gram_II)
    before_O, after_O = (_losses(weight, wanted_OI, moments.gram_II) for weight in (start, found))
    assert bool((after_O <= before_O * (1 + 1e-6)).all())
    assert float(after_O.sum()) < 0.97 * float(before_O.sum())


def test_more_sweeps_lower_the_error_further(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, gram_II, wanted_OI = Grid(4, 64, False), _gram(128), _weight(32, 128)
    start = round_to_nearest(wanted_OI, grid)
    losses = []
    for sweeps in (0, 1, 2, 4):
        monkeypatch.setattr(descend, "SWEEPS", sweeps)
        losses.append(float(_losses(descended_weight(start, wanted_OI, gram_II), wanted_OI, gram_II).sum()))
    assert losses == sorted(losses, reverse=True)


def test_a_weight_on_its_grid_stays_as_it_is() -> None:
    grid = Grid(4, 32, True)
    start = round_to_nearest(_weight(8, 64), grid)
    found = descended_weight(start, start.dequantize(), _gram(64))
    assert torch.equal(found.codes_OI, start.codes_OI) and torch.equal(found.scales_OG, start.scales_OG)
