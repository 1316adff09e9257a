"""Each kernel in PyTorch and in Triton: the two against each other, and PyTorch's against the modules that define it.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest); scripts/test-gpu runs the same comparisons
on a GPU, in sizes that fill it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import w4a16
from dsquant.kernels import clipping, compensation, descent, fp8, grids, losses, packing
from dsquant.kernels.fp8 import dequantize_fp8
from dsquant.kernels.values import RoundedRows
from dsquant.quantization.clip import SHRINKS
from dsquant.schemes import Grid, fake_quantize, grid_parameters, round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = settings(max_examples=4, deadline=None)
bits_of_codes = st.integers(2, 8)
few_rows = st.integers(1, 40)
seeds = st.integers(0, 2**20)


def _weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal weights with an all-zero row, a one-sided one and outliers."""
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight_OI[:, ::29] *= 6
    weight_OI[rows // 2] = 0
    weight_OI[rows // 3].abs_()
    return weight_OI


def _gram(columns: int, seed: int) -> torch.Tensor:
    inputs_RI = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed))
    inputs_RI[:, 1:] += inputs_RI[:, :-1]
    inputs_RI[:, ::17] *= 5
    return inputs_RI.T @ inputs_RI / len(inputs_RI)


def _factor(gram_II: torch.Tensor) -> torch.Tensor:
    inverse_II = torch.linalg.inv(gram_II.double() + 0.01 * gram_II.diagonal().mean() * torch.eye(len(gram_II)))
    return torch.linalg.cholesky(inverse_II, upper=True).float()


@given(bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_the_kernels_grid_is_the_one_that_rounding_defines(bits: int, symmetric: bool, seed: int) -> None:
    weight_OI, shrink_OG = _weight(6, 96, seed), torch.rand(6, 3, generator=torch.Generator().manual_seed(seed)) + 0.01
    ours = grids.grid_parameters(weight_OI, 32, bits, symmetric, shrink_OG)
    for mine_OG, defined_OG in zip(ours, grid_parameters(weight_OI, Grid(bits, 32, symmetric), shrink_OG), strict=True):
        assert torch.equal(mine_OG, defined_OG)


def _same_compensation(
    rows: int, size: int, bits: int, symmetric: bool, seed: int, shrinks: tuple[float, ...] = SHRINKS
) -> None:
    from dsquant.kernels import compensation_triton

    weight_SO, factor_SS = _weight(rows, size, seed).T.contiguous(), _factor(_gram(size, seed))
    expected = compensation.compensate_group_reference(weight_SO, factor_SS, shrinks, bits, symmetric)
    on_device = (weight_SO.to(DEVICE), factor_SS.to(DEVICE))
    found = compensation_triton.compensate_group(*on_device, shrinks, bits, symmetric)
    losses_O, least_O = found.errors_SO.cpu().square().sum(0), expected.errors_SO.square().sum(0)
    assert float(losses_O.sum()) == pytest.approx(float(least_O.sum()), rel=1e-2 if rows < 100 else 1e-4)
    same_O = (found.scales_O.cpu() == expected.scales_O) & (found.codes_SO.cpu() == expected.codes_SO).all(0)
    assert float(same_O.float().mean()) > 0.9
    torch.testing.assert_close(losses_O[same_O], least_O[same_O], rtol=1e-4, atol=1e-6)
    assert torch.equal(found.zero_points_O.cpu()[same_O], expected.zero_points_O[same_O])
    _errors_are_those_of_the_codes(weight_SO, factor_SS, found)


def _errors_are_those_of_the_codes(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, found: compensation.CompensatedGroup
) -> None:
    """W - Q = U^T E: what the errors promise to later groups is what the codes leave over."""
    centred_SO = found.codes_SO.cpu().float() - found.zero_points_O.cpu().float()
    left_SO = weight_SO - centred_SO * found.scales_O.cpu()
    torch.testing.assert_close(factor_SS.triu().T @ found.errors_SO.cpu(), left_SO, rtol=1e-3, atol=1e-3)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_compensation_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_compensation(rows, size, bits, symmetric, seed, SHRINKS[::5])


def _same_descent(rows: int, size: int, bits: int, symmetric: bool, seed: int) -> None:
    from dsquant.kernels import descent_triton

    weight_OI, gram_II = _weight(rows, size, seed), _gram(size, seed)
    rounded = round_to_nearest(weight_OI, Grid(bits, size, symmetric))
    gradient_SO = (rounded.difference(weight_OI) @ gram_II).T.contiguous()

    def group(device: str) -> descent.DescendingGroup:
        parts = (rounded.codes_OI.T.float(), rounded.scales_OG[:, 0], rounded.zero_points_OG[:, 0].float())
        return descent.DescendingGroup(*(part.contiguous().to(device, copy=True) for part in parts))

    def dequantized(group: descent.DescendingGroup) -> torch.Tensor:
        return ((group.codes_SO - group.zero_points_O) * group.scales_O).cpu()

    def loss(group: descent.DescendingGroup) -> float:
        left_OI = dequantized(group).T - weight_OI
        return float(((left_OI @ gram_II) * left_OI).sum())

    before, expected, found = group("cpu"), group("cpu"), group(DEVICE)
    descent.descend_group_reference(expected, gradient_SO, gram_II, 2**bits - 1, symmetric)
    on_device = (gradient_SO.to(DEVICE), gram_II.to(DEVICE))
    changes_SO = descent_triton.descend_group(found, *on_device, 2**bits - 1, symmetric)
    torch.testing.assert_close(changes_SO.cpu(), dequantized(found) - dequantized(before))
    same_O = (found.codes_SO.cpu() == expected.codes_SO).all(0) & (found.scales_O.cpu() == expected.scales_O)
    assert float((same_O & (found.zero_points_O.cpu() == expected.zero_points_O)).float().mean()) > 0.9
    assert loss(found) <= loss(before)
    assert loss(found) == pytest.approx(loss(expected), rel=1e-2 if rows < 100 else 1e-3)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64]), bits=st.integers(2, 4), symmetric=st.booleans(), seed=seeds)
def test_descent_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_descent(rows, size, bits, symmetric, seed)


def _same_shrinks(rows: int, size: int, num_groups: int, bits: int, symmetric: bool, seed: int) -> None:
    from dsquant.kernels import clipping_triton

    weight_OI = _weight(rows, num_groups * size, seed)
    grams_GSS = torch.stack([_gram(size, seed + group) for group in range(num_groups)])
    expected_OG = clipping.best_shrinks_reference(weight_OI, grams_GSS, SHRINKS, bits, symmetric)
    found_OG = clipping_triton.best_shrinks(weight_OI.to(DEVICE), grams_GSS.to(DEVICE), SHRINKS, bits, symmetric).cpu()
    assert set(found_OG.unique().tolist()) <= {float(torch.tensor(shrink)) for shrink in SHRINKS}
    assert float((found_OG == expected_OG).float().mean()) > 0.98
    losses_OG, least_OG = (
        _losses_by_group(weight_OI, grams_GSS, shrink_OG, bits, symmetric) for shrink_OG in (found_OG, expected_OG)
    )
    torch.testing.assert_close(losses_OG, least_OG, rtol=1e-4, atol=1e-7)


def _losses_by_group(
    weight_OI: torch.Tensor, grams_GSS: torch.Tensor, shrink_OG: torch.Tensor, bits: int, symmetric: bool
) -> torch.Tensor:
    size = grams_GSS.shape[1]
    scales_OG, zeros_OG = grids.grid_parameters(weight_OI, size, bits, symmetric, shrink_OG)
    scales_OI, zeros_OI = (part.repeat_interleave(size, 1) for part in (scales_OG, zeros_OG))
    codes_OI = ((weight_OI / scales_OI).round() + zeros_OI).clamp(0, 2**bits - 1)
    difference_OGS = ((codes_OI - zeros_OI) * scales_OI - weight_OI).double().unflatten(1, (-1, size))
    return torch.einsum("ogs,gst,ogt->og", difference_OGS, grams_GSS.double(), difference_OGS)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64, 128]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_clip_search_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_shrinks(rows, size, 2, bits, symmetric, seed)


def _same_rounding(rows: int, size: int, num_groups: int, bits: int, symmetric: bool, seed: int) -> None:
    from dsquant.kernels import rounding_triton

    weight_OI = _weight(rows, num_groups * size, seed).bfloat16().float()  # coarse: exact halves occur
    generator = torch.Generator().manual_seed(seed)
    shrink_OG = torch.rand(rows, num_groups, generator=generator) + 0.01
    scales_CI = torch.cat(
        [torch.ones(1, num_groups * size), torch.rand(2, num_groups * size, generator=generator) + 0.1]
    )
    for shrink in (1.0, 0.96, shrink_OG):
        expected = round_to_nearest(weight_OI, Grid(bits, size, symmetric), shrink)
        on_device = shrink.to(DEVICE) if isinstance(shrink, torch.Tensor) else shrink
        for found in (
            grids.round_rows_reference(weight_OI, size, bits, symmetric, shrink),
            rounding_triton.round_rows(weight_OI.to(DEVICE), size, bits, symmetric, on_device),
        ):
            assert torch.equal(found.codes_OI.cpu(), expected.codes_OI)
            assert torch.equal(found.scales_OG.cpu(), expected.scales_OG)
            assert torch.equal(found.zero_points_OG.cpu(), expected.zero_points_OG)
            for minus_OI in (None, weight_OI):
                wanted_OI = grids.dequantize_rows_reference(expected, size, minus_OI)
                minus = None if minus_OI is None else minus_OI.to(DEVICE)
                assert torch.equal(rounding_triton.dequantize_rows(_on(DEVICE, found), size, minus).cpu(), wanted_OI)
    grid = Grid(bits, size, symmetric)
    expected_COI = torch.stack([fake_quantize(weight_OI * s_I, grid).div_(s_I).sub_(weight_OI) for s_I in scales_CI])
    shape = (size, bits, symmetric)
    assert torch.equal(grids.fake_quantize_difference_reference(weight_OI, scales_CI, *shape), expected_COI)
    found_COI = rounding_triton.fake_quantize_difference(weight_OI.to(DEVICE), scales_CI.to(DEVICE), *shape)
    assert torch.equal(found_COI.cpu(), expected_COI)


def _on(device: str, rounded: RoundedRows) -> RoundedRows:
    return RoundedRows(rounded.codes_OI.to(device), rounded.scales_OG.to(device), rounded.zero_points_OG.to(device))


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64, 128]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_plain_rounding_is_the_same_to_the_bit_everywhere(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_rounding(rows, size, 3, bits, symmetric, seed)


def _same_losses(rows: int, columns: int, seed: int) -> None:
    from dsquant.kernels import losses_triton

    difference_OI, gram_II = _weight(rows, columns, seed) * 0.1, _gram(columns, seed)
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

    weight = round_to_nearest(_weight(16, 96, seed), Grid(bits, 32, symmetric=False))
    stored = CompressedTensors().pack("linear", weight)
    assert torch.equal(packing.pack_rows(weight.codes_OI, bits), stored["linear.weight_packed"])
    weight = round_to_nearest(_weight(16, 96, seed), Grid(4, 32, symmetric=False))
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
    weight_OI = _weight(out_features, size * num_groups, seed + 1)
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
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_searches_on_the_gpu_do_what_the_references_do(size: int, symmetric: bool) -> None:
    _same_compensation(4100, size, 4, symmetric, 5)
    _same_descent(4100, size, 4, symmetric, 5)
    _same_shrinks(1030, size, 9, 4, symmetric, 5)


@pytest.mark.gpu
def test_single_passes_on_the_gpu_do_what_the_references_do() -> None:
    for size in (32, 64, 128):
        for symmetric in (False, True):
            _same_rounding(700, size, 11, 4, symmetric, 5)
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
