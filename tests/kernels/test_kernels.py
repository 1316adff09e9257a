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
from dsquant.kernels.values import Kind, Levels, Parameters
from dsquant.schemes import CLIP_RATIOS, Grid, fake_quantize, round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = settings(max_examples=4, deadline=None)
bits_of_codes = st.integers(2, 8)
few_rows = st.integers(1, 40)
seeds = st.integers(0, 2**20)
TABLE = Levels(4, Kind.TABLE, table=(-3.0, -1.0, 0.0, 1.5, 4.0), thresholds=(-2.0, -0.5, 0.75, 2.75))
OFFSETS = Levels(15, Kind.OFFSETS)
FIXED = Levels(7, fixed=True)
OTHERS = [TABLE, OFFSETS, FIXED]


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


def _given(rows: int, num_blocks: int, levels: Levels, seed: int, candidates: int = 3) -> Parameters:
    """Candidates of any levels: scales of any size, some of them 0 where that may be; offsets and zero points."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(candidates, rows, num_blocks, generator=generator) / max(levels.table or (levels.largest / 4,))
    zeros = torch.zeros_like(scales)
    if levels.movable:
        zeros = torch.randint(0, levels.largest + 1, scales.shape, generator=generator).float()
    else:
        scales[:, rows // 2] = 0
    if levels.fixed:
        scales[:, ::3] *= -1
        zeros += levels.middle
    return Parameters(scales.bfloat16().float(), scales * 4 if levels.kind == Kind.OFFSETS else zeros)


def _integers(bits: int, symmetric: bool) -> Levels:
    return Grid(bits, 32, symmetric).levels


def _same_compensation(rows: int, size: int, levels: Levels, seed: int, candidates: Parameters | None = None) -> None:
    from dsquant.kernels import compensation_triton

    weight_SO, factor_SS = _weight(rows, size, seed).T.contiguous(), _factor(_gram(size, seed))
    if candidates is None:
        candidates = grids.range_parameters_reference(weight_SO.T, size, levels, CLIP_RATIOS[::5])
    expected = compensation.compensate_group_reference(weight_SO, factor_SS, candidates, levels)
    on_device = (weight_SO.to(DEVICE), factor_SS.to(DEVICE), candidates.each(lambda part: part.to(DEVICE)))
    found = compensation_triton.compensate_group(*on_device, levels)
    losses_O, least_O = found.errors_SO.cpu().square().sum(0), expected.errors_SO.square().sum(0)
    assert float(losses_O.sum()) == pytest.approx(float(least_O.sum()), rel=1e-2 if rows < 100 else 1e-4)
    chosen_O = found.chosen_O.cpu()
    same_O = (chosen_O == expected.chosen_O) & (found.codes_SO.cpu() == expected.codes_SO).all(0)
    assert float(same_O.float().mean()) > 0.9
    torch.testing.assert_close(losses_O[same_O], least_O[same_O], rtol=1e-4, atol=1e-6)
    _errors_are_those_of_the_codes(weight_SO, factor_SS, found, candidates, levels)


def _errors_are_those_of_the_codes(
    weight_SO: torch.Tensor,
    factor_SS: torch.Tensor,
    found: compensation.CompensatedGroup,
    candidates: Parameters,
    levels: Levels,
) -> None:
    """W - Q = U^T E: what the errors promise to later groups is what the codes leave over."""
    chosen = candidates.chosen(found.chosen_O.cpu().unsqueeze(1))
    left_OS = -grids.dequantize_rows_reference(found.codes_SO.T.cpu(), chosen, levels, weight_SO.T)
    torch.testing.assert_close(factor_SS.triu().T @ found.errors_SO.cpu(), left_OS.T, rtol=1e-3, atol=1e-3)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_compensation_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_compensation(rows, size, _integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, levels=st.sampled_from(OTHERS), blocks=st.sampled_from([1, 2, 4]), seed=seeds)
def test_compensation_in_triton_takes_any_levels_and_several_blocks(
    rows: int, levels: Levels, blocks: int, seed: int
) -> None:
    _same_compensation(rows, 64, levels, seed, _given(rows, blocks, levels, seed))


def _same_descent(rows: int, size: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import descent_triton

    weight_OI, gram_II = _weight(rows, size, seed), _gram(size, seed)
    if levels.movable:
        codes_OI, start = grids.round_to_range_reference(weight_OI, size, levels)
    else:
        start = _given(rows, 1, levels, seed).each(lambda part: part[0])
        codes_OI = grids.round_rows_reference(weight_OI, start, levels)
    gradient_OI = grids.dequantize_rows_reference(codes_OI, start, levels, weight_OI) @ gram_II
    gradient_SO = gradient_OI.T.contiguous()

    def block(device: str) -> descent.DescendingBlock:
        zeros_O = start.zero_points[:, 0] * (levels.kind == Kind.INTEGERS)
        parts = (grids.values_of_codes(codes_OI, levels).T, start.scales[:, 0], zeros_O)
        return descent.DescendingBlock(*(part.contiguous().to(device, copy=True) for part in parts))

    def dequantized(block: descent.DescendingBlock) -> torch.Tensor:
        return ((block.levels_SO - block.zero_points_O) * block.scales_O).cpu()

    before, expected, found = block("cpu"), block("cpu"), block(DEVICE)

    def loss(block: descent.DescendingBlock) -> float:
        change_OI = (dequantized(block) - dequantized(before)).T
        return float(((change_OI @ gram_II + 2 * gradient_OI) * change_OI).sum())

    descent.descend_block_reference(expected, gradient_SO, gram_II, levels)
    changes_SO = descent_triton.descend_block(found, gradient_SO.to(DEVICE), gram_II.to(DEVICE), levels)
    torch.testing.assert_close(changes_SO.cpu(), dequantized(found) - dequantized(before))
    same_O = (found.levels_SO.cpu() == expected.levels_SO).all(0) & (found.scales_O.cpu() == expected.scales_O)
    assert float((same_O & (found.zero_points_O.cpu() == expected.zero_points_O)).float().mean()) > 0.9
    assert loss(found) <= 0
    assert loss(found) == pytest.approx(loss(expected), rel=1e-2 if rows < 100 else 1e-3)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64]), bits=st.integers(2, 4), symmetric=st.booleans(), seed=seeds)
def test_descent_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_descent(rows, size, _integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_descent_in_triton_takes_any_levels(rows: int, size: int, levels: Levels, seed: int) -> None:
    _same_descent(rows, size, levels, seed)


def _same_clip_losses(rows: int, size: int, num_blocks: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import clipping_triton

    weight_OI = _weight(rows, num_blocks * size, seed)
    grams_BSS = torch.stack([_gram(size, seed + block) for block in range(num_blocks)])
    if levels.movable:
        candidates = grids.range_parameters_reference(weight_OI, size, levels, CLIP_RATIOS)
    else:
        candidates = _given(rows, num_blocks, levels, seed)
    expected_COB = clipping.clip_losses_reference(weight_OI, grams_BSS, candidates, levels)
    on_device = (weight_OI.to(DEVICE), grams_BSS.to(DEVICE), candidates.each(lambda part: part.to(DEVICE)))
    found_COB = clipping_triton.clip_losses(*on_device, levels).cpu()
    torch.testing.assert_close(found_COB, expected_COB, rtol=1e-3, atol=1e-7)
    for place, losses_OB in enumerate(expected_COB):
        one = candidates.each(lambda part, place=place: part[place])
        codes_OI = grids.round_rows_reference(weight_OI, one, levels)
        difference_OI = grids.dequantize_rows_reference(codes_OI, one, levels, weight_OI)
        difference_OBS = difference_OI.double().unflatten(1, (-1, size))
        exact_OB = torch.einsum("obs,bst,obt->ob", difference_OBS, grams_BSS.double(), difference_OBS)
        torch.testing.assert_close(losses_OB.double(), exact_OB, rtol=1e-4, atol=1e-7)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64, 128]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_clip_search_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_clip_losses(rows, size, 2, _integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_clip_search_in_triton_takes_any_levels(rows: int, size: int, levels: Levels, seed: int) -> None:
    _same_clip_losses(rows, size, 3, levels, seed)


def _coarse_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return _weight(rows, columns, seed).bfloat16().float()  # exact halves occur


def _same_rounding(rows: int, size: int, num_groups: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import rounding_triton

    weight_OI = _coarse_weight(rows, num_groups * size, seed)
    ratios = (1.0, 0.96, 0.31)
    candidates = grids.range_parameters_reference(weight_OI, size, levels, ratios)
    for strides_OI in (weight_OI.to(DEVICE), weight_OI.to(DEVICE).T.contiguous().T):
        found = rounding_triton.range_parameters(strides_OI, size, levels, ratios)
        assert torch.equal(found.scales.cpu(), candidates.scales)
        assert torch.equal(found.zero_points.cpu(), candidates.zero_points)
    plain_OI, plain = grids.round_to_range_reference(weight_OI, size, levels)
    found_OI, found = rounding_triton.round_to_range(weight_OI.to(DEVICE), size, levels)
    assert torch.equal(found_OI.cpu(), plain_OI) and torch.equal(found.scales.cpu(), plain.scales)
    assert torch.equal(found.zero_points.cpu(), plain.zero_points)
    _same_codes(weight_OI, candidates, levels)
    generator = torch.Generator().manual_seed(seed)
    scales_CI = torch.rand(3, num_groups * size, generator=generator) + 0.1
    scales_CI[0] = 1
    expected_COI = grids.fake_quantize_difference_reference(weight_OI, scales_CI, size, levels)
    found_COI = rounding_triton.fake_quantize_difference(weight_OI.to(DEVICE), scales_CI.to(DEVICE), size, levels)
    assert torch.equal(found_COI.cpu(), expected_COI)
    grid = Grid(levels.largest.bit_length(), size, levels.symmetric)
    rounded_COI = torch.stack([fake_quantize(weight_OI * s_I, grid).div_(s_I).sub_(weight_OI) for s_I in scales_CI])
    assert torch.equal(expected_COI, rounded_COI)


def _same_codes(weight_OI: torch.Tensor, candidates: Parameters, levels: Levels) -> None:
    """Rounding to given parameters, and back."""
    from dsquant.kernels import rounding_triton

    for place in range(len(candidates.scales)):
        one = candidates.each(lambda part, place=place: part[place])
        expected_OI = grids.round_rows_reference(weight_OI, one, levels)
        on_device = one.each(lambda part: part.to(DEVICE))
        assert torch.equal(rounding_triton.round_rows(weight_OI.to(DEVICE), on_device, levels).cpu(), expected_OI)
        for minus_OI in (None, weight_OI):
            wanted_OI = grids.dequantize_rows_reference(expected_OI, one, levels, minus_OI)
            minus = None if minus_OI is None else minus_OI.to(DEVICE)
            found_OI = rounding_triton.dequantize_rows(expected_OI.to(DEVICE), on_device, levels, minus)
            assert torch.equal(found_OI.cpu(), wanted_OI)


@interpreted
@given(rows=few_rows, size=st.sampled_from([32, 64, 128]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_plain_rounding_is_the_same_to_the_bit_everywhere(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_rounding(rows, size, 3, _integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_rounding_to_any_levels_is_the_same_to_the_bit_everywhere(
    rows: int, size: int, levels: Levels, seed: int
) -> None:
    _same_codes(_coarse_weight(rows, 3 * size, seed), _given(rows, 3, levels, seed), levels)


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
    levels = _integers(4, symmetric)
    _same_compensation(4100, size, levels, 5)
    _same_descent(4100, size, levels, 5)
    _same_clip_losses(1030, size, 9, levels, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("levels", OTHERS, ids=["table", "offsets", "fixed"])
@pytest.mark.parametrize(("size", "blocks"), [(128, 8), (256, 8), (32, 1)])
def test_searches_on_the_gpu_take_any_levels(size: int, blocks: int, levels: Levels) -> None:
    block = size // blocks
    _same_compensation(4100, size, levels, 5, _given(4100, blocks, levels, 5))
    _same_descent(4100, block, levels, 5)
    _same_clip_losses(1030, block, 9, levels, 5)
    _same_codes(_coarse_weight(700, 11 * block, 5), _given(700, 11, levels, 5), levels)


@pytest.mark.gpu
def test_single_passes_on_the_gpu_do_what_the_references_do() -> None:
    for size in (32, 64, 128):
        for symmetric in (False, True):
            _same_rounding(700, size, 11, _integers(4, symmetric), 5)
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
