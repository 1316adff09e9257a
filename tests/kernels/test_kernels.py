"""Each kernel in PyTorch and in Triton: the two against each other, and PyTorch's against the modules that define it.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest); scripts/test-gpu runs the same comparisons
on a GPU, in sizes that fill it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    DEVICE,
    OTHERS,
    bits_of_codes,
    coarse_weight,
    few_rows,
    integers,
    interpreted,
    random_gram,
    random_parameters,
    random_weight,
    same_codes,
    seeds,
)

from benchmarks import w4a16
from dsquant.kernels import fp8, grids, losses, packing
from dsquant.kernels.fp8 import dequantize_fp8
from dsquant.kernels.values import Levels
from dsquant.schemes import Grid, fake_quantize, round_to_nearest


def _same_rounding(rows: int, size: int, num_groups: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import rounding_triton

    weight_OI = coarse_weight(rows, num_groups * size, seed)
    ratios = (1.0, 0.96, 0.31, -0.7) if levels.symmetric else (1.0, 0.96, 0.31)
    candidates = grids.range_parameters_reference(weight_OI, size, levels, ratios)
    for strides_OI in (weight_OI.to(DEVICE), weight_OI.to(DEVICE).T.contiguous().T):
        found = rounding_triton.range_parameters(strides_OI, size, levels, ratios)
        assert torch.equal(found.scales.cpu(), candidates.scales)
        assert torch.equal(found.zero_points.cpu(), candidates.zero_points)
    plain_OI, plain = grids.round_to_range_reference(weight_OI, size, levels)
    found_OI, found = rounding_triton.round_to_range(weight_OI.to(DEVICE), size, levels)
    assert torch.equal(found_OI.cpu(), plain_OI) and torch.equal(found.scales.cpu(), plain.scales)
    assert torch.equal(found.zero_points.cpu(), plain.zero_points)
    same_codes(weight_OI, candidates, levels)
    generator = torch.Generator().manual_seed(seed)
    scales_CI = torch.rand(3, num_groups * size, generator=generator) + 0.1
    scales_CI[0] = 1
    expected_COI = grids.fake_quantize_difference_reference(weight_OI, scales_CI, size, levels)
    found_COI = rounding_triton.fake_quantize_difference(weight_OI.to(DEVICE), scales_CI.to(DEVICE), size, levels)
    assert torch.equal(found_COI.cpu(), expected_COI)
    grid = Grid(levels.largest.bit_length(), size, levels.symmetric)
    rounded_COI = torch.stack([fake_quantize(weight_OI * s_I, grid).div_(s_I).sub_(weight_OI) for s_I in scales_CI])
    assert torch.equal(expected_COI, rounded_COI)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64, 128]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_plain_rounding_is_the_same_to_the_bit_everywhere(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_rounding(rows, size, 3, integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_rounding_to_any_levels_is_the_same_to_the_bit_everywhere(
    rows: int, size: int, levels: Levels, seed: int
) -> None:
    same_codes(coarse_weight(rows, 3 * size, seed), random_parameters(rows, 3, levels, seed), levels)


def _same_losses(rows: int, columns: int, seed: int) -> None:
    from dsquant.kernels import losses_triton

    difference_OI, gram_II = random_weight(rows, columns, seed) * 0.1, random_gram(columns, seed)
    exact_O = (difference_OI.double() @ gram_II.double() * difference_OI).sum(1)
    for found_O in (
        losses.gram_losses_reference(difference_OI, gram_II),
        losses_triton.gram_losses(difference_OI.to(DEVICE), gram_II.to(DEVICE)).cpu(),
    ):
        torch.testing.assert_close(found_O.double(), exact_O, rtol=1e-4, atol=1e-9)


@interpreted
@given(rows=few_rows, columns=st.integers(1, 300), seed=seeds)
def test_gram_losses_are_the_exact_ones_within_float32s_error(rows: int, columns: int, seed: int) -> None:
    _same_losses(rows, columns, seed)


def _same_words(rows: int, columns: int, bits: int, seed: int) -> None:
    from dsquant.kernels import packing_triton

    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, 16, (8 * rows, columns), dtype=torch.uint8, generator=generator)
    expected = packing.pack_awq_reference(codes_OI)
    assert torch.equal(packing_triton.pack_awq(codes_OI.to(DEVICE)).cpu(), expected)
    codes_OI = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    expected = packing.pack_rows_reference(codes_OI, bits)
    assert torch.equal(packing_triton.pack_rows(codes_OI.to(DEVICE), bits).cpu(), expected)


@interpreted
@given(rows=few_rows, columns=st.integers(1, 90), bits=st.sampled_from([2, 4, 8]), seed=seeds)
def test_packing_in_triton_does_what_the_reference_does(rows: int, columns: int, bits: int, seed: int) -> None:
    _same_words(rows, columns, bits, seed)


@settings(max_examples=20, deadline=None)
@given(bits=bits_of_codes, seed=seeds)
def test_the_writers_layouts_are_the_kernels(bits: int, seed: int) -> None:
    from dsquant.formats.awq_gemm import AwqGemm
    from dsquant.formats.compressed_tensors import CompressedTensors

    weight = round_to_nearest(random_weight(16, 96, seed), Grid(bits, 32, symmetric=False))
    stored = CompressedTensors().pack("linear", weight)
    assert torch.equal(packing.pack_rows(weight.codes_OI, bits), stored["linear.weight_packed"])
    weight = round_to_nearest(random_weight(16, 96, seed), Grid(4, 32, symmetric=False))
    stored = AwqGemm().pack("linear", weight)
    assert torch.equal(packing.pack_awq(weight.codes_OI), stored["linear.qweight"])
    assert torch.equal(packing.pack_awq(weight.zero_points_OG), stored["linear.qzeros"])


def _same_fp8(rows: int, columns: int, block: tuple[int, int], seed: int) -> None:
    from dsquant.kernels import fp8_triton

    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    weight_OI = weight_OI.view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator) * 1e-3
    expected_OI = dequantize_fp8(weight_OI, scales, block)
    for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
        for found_OI in (
            fp8.dequantize_fp8_reference(weight_OI, scales, block, dtype),
            fp8_triton.dequantize_fp8(weight_OI.to(DEVICE), scales.to(DEVICE), block, dtype).cpu(),
        ):
            torch.testing.assert_close(found_OI, expected_OI.to(dtype), rtol=0, atol=0, equal_nan=True)


@interpreted
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (16, 32), (7, 5)]),
    seed=seeds,
)
def test_fp8_is_dequantized_to_the_same_bits_everywhere(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    _same_fp8(rows, columns, block, seed)


def _same_product(rows: int, out_features: int, size: int, num_groups: int, dtype: torch.dtype, seed: int) -> None:
    """Both layouts, both implementations, against the product in float64."""
    from benchmarks import w4a16_triton

    inputs_MI = torch.randn(rows, size * num_groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight_OI = random_weight(out_features, size * num_groups, seed + 1)
    for symmetric in (True, False):
        weight = round_to_nearest(weight_OI, Grid(4, size, symmetric))
        exact_MO = inputs_MI.double() @ weight.dequantize().double().T
        scales_GO = weight.scales_OG.T.to(torch.float16).contiguous()
        awq = (inputs_MI, packing.pack_awq(weight.codes_OI), packing.pack_awq(weight.zero_points_OG), scales_GO)
        found = [w4a16.matmul_awq_reference(*awq), w4a16_triton.matmul_awq(*(part.to(DEVICE) for part in awq)).cpu()]
        if symmetric:
            dense = (inputs_MI, packing.pack_rows(weight.codes_OI, 4), weight.scales_OG.to(torch.bfloat16))
            found.append(w4a16.matmul_pack_quantized_reference(*dense))
            found.append(w4a16_triton.matmul_pack_quantized(*(part.to(DEVICE) for part in dense)).cpu())
        for product_MO in found:
            assert product_MO.dtype == dtype
            error = (product_MO.double() - exact_MO).norm() / exact_MO.norm()
            assert float(error) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


@interpreted
@given(
    rows=st.integers(1, 140),
    words=st.integers(1, 20),
    size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=seeds,
)
def test_products_with_four_bit_weights_are_the_exact_ones_within_the_types_error(
    rows: int, words: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    _same_product(rows, 8 * words, size, 3, dtype, seed)


@pytest.mark.gpu
def test_single_passes_on_the_gpu_do_what_the_references_do() -> None:
    for size in (32, 64, 128):
        for symmetric in (False, True):
            _same_rounding(700, size, 11, integers(4, symmetric), 5)
    _same_losses(300, 1000, 5)
    for bits in (2, 4, 8):
        _same_words(77, 1001, bits, 5)
    _same_fp8(576, 7168, (128, 128), 5)
    _same_fp8(301, 1003, (128, 128), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_products_on_the_gpu_are_the_exact_ones_within_the_types_error(size: int, dtype: torch.dtype) -> None:
    for rows in (1, 40, 300):
        _same_product(rows, 392, size, 7, dtype, 5)


@pytest.mark.parametrize("block", [(128, 128), (1, 200), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fp8_code_becomes_pytorchs_number_to_the_last_bit(block: tuple[int, int], dtype: torch.dtype) -> None:
    codes = torch.arange(300 * 200).remainder(256).to(torch.uint8).view(300, 200).view(torch.float8_e4m3fn)
    scales = torch.rand(-(-300 // block[0]), -(-200 // block[1]), generator=torch.Generator().manual_seed(0)) * 1e-3
    wide = scales.repeat_interleave(block[0], 0)[:300].repeat_interleave(block[1], 1)[:, :200]
    for part in (codes, codes.where(~codes.float().isnan(), codes[0, 0])):
        wanted, found = (part.float() * wide).to(dtype), dequantize_fp8(part, scales, block, dtype)
        assert torch.equal(wanted.isnan(), found.isnan())
        assert torch.equal(wanted.nan_to_num(), found.nan_to_num())
