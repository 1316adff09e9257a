"""Block bootstrap: honest intervals for tokens that depend on each other, and how many would settle a gate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsquant.evaluation.intervals import BLOCK_TOKENS, Interval, bootstrap_mean, paired_shares, units_to_settle
from dsquant.evaluation.summary import ladder


def correlated(generator: np.random.Generator, samples: int, tokens: int, memory: float) -> np.ndarray:
    """An autoregressive process of mean 0: neighbouring tokens are alike."""
    values = np.zeros((samples, tokens))
    values[:, 0] = generator.normal(size=samples) / (1 - memory**2) ** 0.5
    for token in range(1, tokens):
        values[:, token] = memory * values[:, token - 1] + generator.normal(size=samples)
    return values


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    hits = {"blocks": 0, "single tokens": 0}
    for trial in range(60):
        values = correlated(generator, 4, 512, 0.7)
        for name, block in (("blocks", BLOCK_TOKENS), ("single tokens", 1)):
            found = bootstrap_mean(values, seed=trial, block_tokens=block)
            hits[name] += found.low <= 0 <= found.high
    assert hits["blocks"] >= 54  # 95 % promised; few blocks cost a little
    assert hits["single tokens"] < 45  # what forgetting the correlation would do


@pytest.mark.parametrize(
    ("documents", "lost", "won"), [(20, 0.1, 0.1), (20, 0.02, 0.0), (100, 0.3, 0.1), (500, 0.05, 0.03)]
)
def test_intervals_of_paired_shares_hold_the_truth(documents: int, lost: float, won: float) -> None:
    draw = np.random.default_rng(3).choice([-1.0, 1.0, 0.0], p=[lost, won, 1 - lost - won], size=(1000, documents))
    found = [paired_shares(differences_N) for differences_N in draw]
    assert np.mean([one.low <= won - lost <= one.high for one in found]) > 0.93
    assert all(one.low <= one.estimate <= one.high for one in found)


def test_documents_that_all_came_out_the_same_do_not_show_that_none_would_differ() -> None:
    few, many = (paired_shares(np.zeros(count)) for count in (10, 1000))
    assert few.estimate == 0 and few.high == -few.low > 0.2 and 0 < many.high < 0.003
    better = paired_shares(np.array([1.0] + [0.0] * 39))  # one document of 40 is no proof
    assert better.estimate == 0.025 and better.low < 0 < better.high


@pytest.mark.parametrize("blocks", [2, 4, 12])
def test_intervals_of_few_blocks_hold_the_truth_too(blocks: int) -> None:
    values = np.random.default_rng(2).normal(size=(200, blocks, 64))
    found = [bootstrap_mean(values_NT) for values_NT in values]
    assert 0.9 < np.mean([one.low <= 0 <= one.high for one in found]) <= 0.98


@pytest.mark.parametrize(("share", "blocks"), [(0.6, 2), (0.9, 4), (0.9, 12), (0.98, 12)])
def test_intervals_of_shares_end_between_0_and_1_and_hold_the_truth(share: float, blocks: int) -> None:
    values = np.random.default_rng(2).random(size=(200, blocks, 64)) < share
    found = [bootstrap_mean(values_NT, kind="share") for values_NT in values]
    assert all(0 <= one.low <= one.estimate <= one.high <= 1 for one in found)
    assert np.mean([one.low <= share <= one.high for one in found]) > 0.9


def test_a_constant_has_an_interval_of_no_width_and_one_block_has_none() -> None:
    assert bootstrap_mean(np.full((2, 200), 3.0)) == Interval(3.0, 3.0, 3.0, 8)
    alone = bootstrap_mean(np.arange(10.0)[None])
    assert (alone.estimate, alone.low, alone.high) == (4.5, -np.inf, np.inf)


def test_the_same_seed_draws_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=(3, 300))
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(2, 1000))
def test_with_the_units_asked_for_the_interval_would_end_at_the_limit(
    distance: float, width: float, units: int
) -> None:
    found = Interval(0.0, -width, width, units)
    wanted = units_to_settle(found, distance)
    assert wanted is not None
    new_width = width * (units / wanted) ** 0.5
    assert new_width <= distance * 1.0001 or wanted == 2
    assert wanted == 2 or width * (units / (wanted - 1)) ** 0.5 >= distance * 0.9999


def test_no_number_of_units_settles_an_estimate_on_its_limit() -> None:
    assert units_to_settle(Interval(1.0, 0.5, 1.5, 10), 1.0) is None
    assert units_to_settle(Interval(1.0, -np.inf, np.inf, 1), 2.0) is None


def test_a_ladder_has_numpys_quantiles() -> None:
    values = np.random.default_rng(0).exponential(size=(4, 251))
    found = ladder(values)
    assert found.mean == pytest.approx(values.mean()) and found.median == pytest.approx(np.median(values))
    assert found.p999 == pytest.approx(np.quantile(values, 0.999)) and found.maximum == values.max()
    steps = [found.minimum, found.p01, found.p05, found.p10, found.median, found.p90, found.p95, found.p99, found.p999]
    assert steps == sorted(steps)
