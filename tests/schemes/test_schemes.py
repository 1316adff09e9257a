"""Schemes beside integers: their numbers against independent decoders, and the steps of quantization on each."""

import gguf as gguf_py
import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from ggml_rows import KINDS, awkward_rows, weights
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import correlated, moments_of

from dsquant.formats.gguf.block_bytes import packed
from dsquant.kernels import ggml
from dsquant.kernels.grids import round_rows
from dsquant.kernels.values import Kind, Parameters
from dsquant.quantization.compensate import _order
from dsquant.quantization.scale import candidate_scales, rms_of_columns, scale_losses
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid, QuantizedWeight, Scheme, joined, quantized, round_to_nearest, stacked
from dsquant.schemes.floats import E2M1, E2M1_VALUES, Mxfp4, Nvfp4
from dsquant.schemes.ggml_types import BLOCK_TYPES, GgmlType

OF_GGML = list(BLOCK_TYPES.values())
SCHEMES = [Nvfp4(), Mxfp4(), *OF_GGML]
seeds = st.integers(0, 2**20)
scales_of_weights = st.floats(1e-4, 1e4)
few = settings(max_examples=20, deadline=None)


def _name(scheme: Scheme) -> str:
    return scheme.name if isinstance(scheme, GgmlType) else type(scheme).__name__


def _weight(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp() * scale


def _nibbles(codes_OI: torch.Tensor) -> torch.Tensor:
    """E2M1's own four bits for codes that are ranks: a sign above the three bits of the magnitude."""
    ranks_OI = codes_OI.int() - 7
    return (ranks_OI.abs() + 8 * (ranks_OI < 0)).to(torch.uint8)


def test_values_halfway_between_two_go_to_the_even_one() -> None:
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    wanted = {**ties, **{-tie: -value for tie, value in ties.items()}, 7.0: 6, -100.0: -6, 0.0: 0}
    one = Parameters(torch.ones(1, 1), torch.zeros(1, 1))
    codes_OI = round_rows(torch.tensor([list(wanted)], dtype=torch.float32), one, E2M1)
    assert [E2M1.table[code] for code in codes_OI[0].tolist()] == list(wanted.values())


@few
@given(seed=seeds, scale=scales_of_weights, scheme=st.sampled_from([Nvfp4(), Mxfp4()]))
def test_floats_of_four_bits_are_the_nearest(seed: int, scale: float, scheme: Scheme) -> None:
    weight_OI = _weight(5, 64, seed, scale)
    found = round_to_nearest(weight_OI, scheme)
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)
    steps_OI1 = (weight_OI / found.scales_OG.repeat_interleave(scheme.block_size, 1)).double().unsqueeze(-1)
    least_OI = (steps_OI1 - signed).abs().amin(-1)
    chosen_OI1 = torch.tensor(E2M1.table, dtype=torch.float64)[found.codes_OI.long()].unsqueeze(-1)
    assert torch.equal((steps_OI1 - chosen_OI1).abs().squeeze(-1), least_OI)


@few
@given(seed=seeds, scale=scales_of_weights)
def test_nvfp4_is_what_ggufs_decoder_reads(seed: int, scale: float) -> None:
    weight_OI = _weight(4, 128, seed, scale)
    found = round_to_nearest(weight_OI, Nvfp4())
    assert isinstance(found.grid, Nvfp4)
    block_scales = found.scales_OG / found.grid.tensor_scale
    stored = block_scales.to(torch.float8_e4m3fn)
    assert torch.equal(stored.float(), block_scales)
    every_E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    wanted = (weight_OI.unflatten(1, (-1, 16)).abs().amax(-1).double() / 6 / found.grid.tensor_scale).unsqueeze(-1)
    nearest = (wanted - every_E4M3).abs().amin(-1)
    torch.testing.assert_close((wanted.squeeze(-1) - block_scales).abs(), nearest, rtol=1e-5, atol=1e-7)
    # ggml's blocks of 64: four scales, then for each 16 codes bytes of element j and j + 8
    scales_S4 = stored.view(torch.uint8).reshape(-1, 4)
    low, high = _nibbles(found.codes_OI).reshape(-1, 4, 16).split(8, 2)
    blocks = torch.cat([scales_S4, (low | (high << 4)).flatten(1)], 1).numpy()
    decoded = torch.from_numpy(np.array(dequantize(blocks, gguf_py.GGMLQuantizationType.NVFP4), dtype=np.float32))
    assert torch.equal(decoded.view_as(weight_OI) * found.grid.tensor_scale, found.dequantize())


def test_a_scale_of_the_tensor_is_a_power_of_two_that_leaves_room_for_larger_block_scales() -> None:
    weight_OI = _weight(8, 64, 3)
    fitted = Nvfp4().fitted(weight_OI)
    assert np.log2(fitted.tensor_scale) % 1 == 0 and fitted.fitted(weight_OI * 9) == fitted
    candidates = fitted.parameters(weight_OI, fitted.clip_ratios)
    largest = int(weight_OI.abs().amax(1).argmax())
    assert float(candidates.scales[1, largest].max()) == pytest.approx(float(weight_OI.abs().max()) / 4, rel=1 / 16)


@few
@given(seed=seeds, scale=scales_of_weights)
def test_mxfp4_is_what_ggufs_decoder_reads_and_compressed_tensors_would_choose(seed: int, scale: float) -> None:
    weight_OI = _weight(4, 128, seed, scale)
    found = round_to_nearest(weight_OI, Mxfp4())
    exponents = found.scales_OG.to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(torch.exp2(exponents.double() - 127), found.scales_OG.double())
    wanted = generate_mx_scales(weight_OI.unflatten(1, (-1, 32)).abs().amax(-1))
    assert torch.equal(exponents.int(), wanted.int())
    low, high = _nibbles(found.codes_OI).reshape(-1, 32).split(16, 1)
    blocks = torch.cat([exponents.reshape(-1, 1), low | (high << 4)], 1).numpy()
    decoded = torch.from_numpy(np.array(dequantize(blocks, gguf_py.GGMLQuantizationType.MXFP4), dtype=np.float32))
    assert torch.equal(decoded.view_as(weight_OI), found.dequantize())


def _read_back(weight: QuantizedWeight) -> torch.Tensor:
    assert isinstance(weight.grid, GgmlType)
    return _decoded(packed(weight), weight.grid)


def _decoded(stored: torch.Tensor, scheme: GgmlType) -> torch.Tensor:
    values = dequantize(stored.numpy(), gguf_py.GGMLQuantizationType[scheme.name])
    return torch.from_numpy(np.array(values, dtype=np.float32))


@pytest.mark.parametrize("scheme", OF_GGML, ids=_name)
@settings(max_examples=8, deadline=None)
@given(seed=seeds, scale=scales_of_weights)
def test_weights_of_ggmls_types_are_read_back_by_gguf_py(scheme: GgmlType, seed: int, scale: float) -> None:
    found = round_to_nearest(_weight(3, 512, seed, scale), scheme)
    assert torch.equal(_read_back(found), found.dequantize())


@pytest.mark.parametrize("scheme", OF_GGML, ids=_name)
def test_any_codes_and_scales_are_read_back(scheme: GgmlType) -> None:
    generator = torch.Generator().manual_seed(1)
    found = round_to_nearest(_weight(64, 512, 2), scheme)
    everything = torch.randint(0, scheme.levels.largest + 1, found.codes_OI.shape, generator=generator)
    scales_OG, offsets_OG = found.scales_OG, found.zero_points_OG
    if scheme.shape.scale_codes:
        least, largest = scheme.shape.scale_codes
        whole = torch.randint(least, largest + 1, (2, *scales_OG.shape), generator=generator)
        scales_OG = found.super_scales_OG[0] * whole[0]
        if scheme.levels.kind == Kind.OFFSETS:
            offsets_OG = found.super_scales_OG[1] * whole[1]
    any_OI = QuantizedWeight(everything.byte(), scales_OG, offsets_OG, scheme, found.super_scales_OG)
    assert torch.equal(_read_back(any_OI), any_OI.dequantize())


@pytest.mark.parametrize("scheme", OF_GGML, ids=_name)
def test_awkward_blocks_of_ggmls_types_are_read_back_too(scheme: GgmlType) -> None:
    found = round_to_nearest(awkward_rows(), scheme)
    assert torch.equal(_read_back(found), found.dequantize())
    assert bool((found.dequantize()[0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", OF_GGML, ids=_name)
def test_plain_rounding_to_ggmls_types_errs_no_more_than_ggml_does(scheme: GgmlType, kind: str) -> None:
    rows_RI, importance_I = weights(kind)
    parameters = scheme.parameters(rows_RI, importance_I=importance_I).each(lambda part: part[0])
    found = quantized(round_rows(rows_RI, parameters, scheme.levels), parameters, scheme)
    theirs_RI = _decoded(ggml.quantize(rows_RI, scheme.name, importance_I), scheme)
    errors = [float(((read_RI - rows_RI).square() @ importance_I).sum()) for read_RI in (found.dequantize(), theirs_RI)]
    assert errors[0] <= 1.02 * errors[1]


def _moments(seed: int, columns: int = 512) -> InputMoments:
    return moments_of(correlated(4 * columns, columns, seed))


# One of each formula and each way to store scales; the others are rows of the same tables.
_QUICK = {"Q2_K", "IQ4_XS", "Q4_0"}
_FAMILIES = [
    scheme
    if not isinstance(scheme, GgmlType) or scheme.name in _QUICK
    else pytest.param(scheme, marks=pytest.mark.slow)
    for scheme in (Grid(4, 128, False), *SCHEMES)
]


@pytest.mark.parametrize("scheme", _FAMILIES, ids=_name)
def test_every_step_lowers_the_error_of_the_output(scheme: Scheme) -> None:
    moments, weight_OI = _moments(5, 256), _weight(48, 256, 6)
    plain, clip, compensate, descend, every = (
        float(moments.loss(rounded_weight(weight_OI, scheme, moments, steps).difference(weight_OI)))
        for steps in ((), ("clip",), ("compensate",), ("descend",), ("clip", "compensate", "descend"))
    )
    assert clip <= (1 if scheme.searched else 0.99) * plain  # a search weighs the inputs' energy without the step
    assert compensate < 0.7 * plain and descend < 0.7 * plain
    assert every < min(clip, compensate, descend)


@pytest.mark.parametrize("scheme", _FAMILIES, ids=_name)
def test_scales_are_searched_for_every_scheme(scheme: Scheme) -> None:
    moments, weight_OI = moments_of(correlated(1024, 256, 5) * torch.linspace(-2, 2, 256).exp()), _weight(24, 256, 6)
    scales_CI = candidate_scales(moments.rms_I, rms_of_columns([weight_OI]))
    losses_C = scale_losses(weight_OI, scales_CI, scheme, moments)
    best = int(losses_C.argmin())
    columns_I = weight_OI.square().sum(0)
    evened_I = (moments.rms_I.square() * columns_I).mean() / columns_I
    for place in (0, best):
        rounded_OI = round_to_nearest(weight_OI * scales_CI[place], scheme).dequantize() / scales_CI[place]
        difference_OI = rounded_OI - weight_OI
        wanted = moments.loss(difference_OI) + (difference_OI.square() * evened_I).sum()
        assert float(wanted) == pytest.approx(float(losses_C[place]), rel=1e-4)
    assert float(losses_C[best]) < 0.95 * float(losses_C[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=_name)
def test_what_the_steps_find_is_what_the_scheme_can_store(scheme: Scheme) -> None:
    moments, weight_OI = _moments(7, 256), _weight(16, 256, 8)
    found = rounded_weight(weight_OI, scheme, moments, ("clip", "compensate", "descend"))
    assert int(found.codes_OI.max()) <= scheme.levels.largest
    if isinstance(scheme, GgmlType):
        assert torch.equal(_read_back(found), found.dequantize())
    elif isinstance(found.grid, Nvfp4):
        block_scales = found.scales_OG / found.grid.tensor_scale
        assert torch.equal(block_scales.to(torch.float8_e4m3fn).float(), block_scales)
    else:
        assert torch.equal(found.scales_OG.log2(), found.scales_OG.log2().round())


@few
@given(seed=seeds, scale=scales_of_weights, scheme=st.sampled_from([Grid(4, 32, False), *SCHEMES]))
def test_what_is_on_the_levels_stays_there(seed: int, scale: float, scheme: Scheme) -> None:
    found = round_to_nearest(_weight(3, 256, seed, scale), scheme)
    again_OI = round_rows(found.dequantize(), found.parameters, scheme.levels)
    free_OI = found.scales_OG.repeat_interleave(scheme.block_size, 1) != 0
    assert torch.equal(again_OI[free_OI], found.codes_OI[free_OI])


@pytest.mark.parametrize("scheme", SCHEMES, ids=_name)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1e4])
def test_weights_of_any_size_are_rounded_to_finite_ones(scheme: Scheme, scale: float) -> None:
    weight_OI = _weight(2, 512, 9, scale)
    found_OI = round_to_nearest(weight_OI, scheme).dequantize()
    assert bool(found_OI.isfinite().all())
    assert float((found_OI - weight_OI).abs().max()) <= max(float(weight_OI.abs().max()), 1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=_name)
def test_parts_of_a_weight_make_it_whole_again(scheme: Scheme) -> None:
    weight_OI = _weight(12, 512, 10)
    whole = round_to_nearest(weight_OI, scheme)
    by_rows = stacked(whole.split([5, 7]))
    by_columns = joined([round_to_nearest(part_OI, whole.grid) for part_OI in weight_OI.split(256, 1)])
    for found in (by_rows, by_columns):
        assert torch.equal(found.dequantize(), whole.dequantize()) and found.grid == whole.grid


def test_columns_are_ordered_inside_blocks_inside_groups() -> None:
    order_I = _order(torch.rand(1024, generator=torch.Generator().manual_seed(11)), BLOCK_TYPES["Q4_K"])
    assert torch.equal(order_I.sort().values, torch.arange(1024))
    for size in (32, 256):
        units = (order_I // size).unflatten(0, (-1, size))
        assert bool((units == units[:, :1]).all())
