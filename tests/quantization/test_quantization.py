"""The arithmetic of AWQ: losses on moments, scales, clip, rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import correlated, moments_of

from dsquant.kernels.grids import round_rows
from dsquant.quantization.clip import clipped_weight
from dsquant.quantization.scale import candidate_scales, foldable_scales, powers_of_two, scale_losses
from dsquant.schemes import Grid, fake_quantize, quantized, round_to_nearest

GRIDS = [Grid(bits, size, symmetric) for bits in (3, 4, 8) for size in (32, 128) for symmetric in (True, False)]


@pytest.mark.parametrize(("columns", "rows"), [(256, 900), (2304, 700)], ids=["gram matrix", "tokens themselves"])
def test_the_loss_on_moments_is_the_mean_squared_output_error(columns: int, rows: int) -> None:
    inputs = correlated(rows, columns, 1)
    difference = torch.randn(8, columns, generator=torch.Generator().manual_seed(2))
    wanted = (inputs @ difference.T).square().sum(1).mean()
    assert float(moments_of(inputs, parts=3).loss(difference)) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.slow
def test_the_loss_on_random_combinations_of_many_tokens_is_near() -> None:
    inputs = correlated(4000, 2304, 3)
    difference = torch.randn(64, 2304, generator=torch.Generator().manual_seed(2))
    wanted = (inputs @ difference.T).square().sum(1).mean()
    assert float(moments_of(inputs, parts=5).loss(difference)) == pytest.approx(float(wanted), rel=0.05)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("columns", [256, pytest.param(2304, marks=pytest.mark.slow)])
def test_group_grams_are_the_diagonal_blocks(size: int, columns: int) -> None:
    inputs = correlated(1500, columns, 4)
    gram = inputs.T @ inputs / len(inputs)
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, columns, size)])
    assert torch.allclose(moments_of(inputs).group_grams_GSS(size), blocks, rtol=1e-3, atol=1e-4 * float(gram.max()))


def test_dividing_moments_is_dividing_inputs() -> None:
    inputs, scales = correlated(800, 256, 5), torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.5
    divided, direct = moments_of(inputs).divided(scales), moments_of(inputs / scales)
    assert torch.allclose(divided.rms_I, direct.rms_I, rtol=1e-4)
    difference = torch.randn(4, 256)
    assert float(divided.loss(difference)) == pytest.approx(float(direct.loss(difference)), rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_rounding_errs_at_most_half_a_step_inside_the_range(grid: Grid, seed: int, scale: float) -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = round_to_nearest(weight, grid)
    steps = rounded.scales_OG.repeat_interleave(grid.group_size, 1)
    inside = (rounded.codes_OI > 0) & (rounded.codes_OI < grid.maximum_code)
    assert bool(((rounded.dequantize() - weight).abs() <= 0.501 * steps)[inside].all())
    assert torch.equal(rounded.scales_OG, rounded.scales_OG.to(torch.bfloat16).float())
    assert torch.equal(rounded.scales_OG, rounded.scales_OG.to(torch.float16).float())


@pytest.mark.parametrize("weight", [torch.zeros(2, 128), torch.full((2, 128), 3.0), torch.full((2, 128), -1e-9)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_groups_round_to_finite_values(weight: torch.Tensor, symmetric: bool) -> None:
    rounded = fake_quantize(weight, Grid(4, 128, symmetric))
    assert bool(rounded.isfinite().all())
    assert float((rounded - weight).abs().max()) <= 0.1 * float(weight.abs().max()) + 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_clipping_never_raises_a_rows_output_error(symmetric: bool, seed: int) -> None:
    grid = Grid(4, 64, symmetric)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(seed))
    weight[:, ::37] *= 6
    moments = moments_of(correlated(512, 256, seed))
    plain = moments.loss_O(round_to_nearest(weight, grid).dequantize() - weight)
    clipped = moments.loss_O(clipped_weight(weight, grid, moments).dequantize() - weight)
    assert bool((clipped <= plain * 1.0001).all()) and float(clipped.sum()) < float(plain.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_reach_farther_on_the_side_of_a_groups_largest_weight(bits: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
    weight[:, 7] = -5
    grid = Grid(bits, 64, symmetric=True)
    below, above = (grid.parameters(one, (1.0, 0.9)) for one in (weight, -weight))
    assert torch.equal(above.scales[0], below.scales[0]), "the whole range is as compressed-tensors computes it"
    assert bool((below.scales > 0).all()) and torch.equal(above.scales[1], -below.scales[1])
    found = []
    for one, candidates in ((weight, below), (-weight, above)):
        chosen = candidates.each(lambda part: part[1])
        found.append(quantized(round_rows(one, chosen, grid.levels), chosen, grid))
        assert bool((found[-1].codes_OI[:, 7] == 0).all())
    assert torch.equal(found[1].dequantize(), -found[0].dequantize())


def test_two_bits_take_the_sign_that_costs_less_not_the_largest_weights() -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.0] * 8])
    weight[0, 3] = 1.1  # -1 and -0.5 want two levels below zero, and it one level above
    moments = moments_of(torch.eye(32))
    for one, sign in ((weight, 1), (-weight, -1)):
        found = clipped_weight(one, Grid(2, 32, symmetric=True), moments)
        assert float(found.scales_OG) * sign == pytest.approx(0.53, abs=0.01)
        assert found.codes_OI.unique().tolist() == [0, 1, 2, 3]


def test_identity_is_always_a_candidate_and_scales_help_where_inputs_differ() -> None:
    inputs = correlated(512, 256, 7)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(8))
    moments = moments_of(inputs)
    scales = candidate_scales(moments.rms_I, weight.square().mean(0).sqrt())
    assert scales.shape == (41, 256) and torch.equal(scales[0], torch.ones(256))
    losses = scale_losses(weight, scales, Grid(4, 64, True), moments)
    assert float(losses.min()) < 0.95 * float(losses[0])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_a_scale_costs_does_not_depend_on_how_channels_are_scaled_before(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(24, 128, generator=generator), correlated(256, 128, seed)
    before = torch.exp2(torch.randint(-3, 4, (128,), generator=generator).float())
    scales = candidate_scales(moments_of(inputs).rms_I, weight.square().mean(0).sqrt())
    losses = scale_losses(weight, scales, Grid(4, 64, True), moments_of(inputs))
    moved = scale_losses(weight * before, scales / before, Grid(4, 64, True), moments_of(inputs / before))
    assert torch.allclose(losses, moved, rtol=1e-4)


def test_columns_without_weights_or_energy_leave_losses_finite() -> None:
    weight, inputs = torch.randn(24, 128), torch.randn(256, 128)
    weight[:, :5], inputs[:, 3:9] = 0, 0
    scales = candidate_scales(moments_of(inputs).rms_I, weight.square().mean(0).sqrt())
    for one in (weight, torch.zeros_like(weight)):
        assert bool(scale_losses(one, scales, Grid(4, 64, True), moments_of(inputs)).isfinite().all())


def test_dead_channels_get_finite_scales() -> None:
    activation, weight = torch.rand(256), torch.rand(256)
    activation[:9] = 0
    weight[4:12] = 0
    assert bool(candidate_scales(activation, weight).isfinite().all())
    assert bool((candidate_scales(torch.zeros(256), torch.zeros(256)) > 0).all())


def test_foldable_scales_leave_the_norm_exact_in_bfloat16() -> None:
    gain = torch.randn(512).to(torch.bfloat16).float()
    gain[3] = 0
    wanted = torch.exp(torch.randn(512))
    scales = foldable_scales(wanted, gain)
    divided = gain / scales
    assert torch.allclose(divided, divided.to(torch.bfloat16).float(), rtol=1e-6, atol=0)
    assert float((scales / wanted - 1).abs()[torch.arange(512) != 3].max()) < 2**-7
    assert bool((powers_of_two(wanted).log2() % 1 == 0).all())
