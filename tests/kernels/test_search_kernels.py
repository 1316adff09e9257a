"""The kernels that search, in PyTorch and in Triton: compensation, descent, clipping (see test_kernels.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import (
    DEVICE,
    OTHERS,
    bits_of_codes,
    coarse_weight,
    factor_of,
    few_rows,
    integers,
    interpreted,
    random_gram,
    random_parameters,
    random_weight,
    same_codes,
    seeds,
)

from dsquant.kernels import clipping, compensation, descent, grids
from dsquant.kernels.values import Kind, Levels, Parameters
from dsquant.schemes import CLIP_RATIOS


def _same_compensation(rows: int, size: int, levels: Levels, seed: int, candidates: Parameters | None = None) -> None:
    from dsquant.kernels import compensation_triton

    weight_SO, factor_SS = random_weight(rows, size, seed).T.contiguous(), factor_of(random_gram(size, seed))
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


@settings(interpreted, max_examples=2)
@given(rows=few_rows, size=st.sampled_from([32, 64]), bits=bits_of_codes, symmetric=st.booleans(), seed=seeds)
def test_compensation_in_triton_does_what_the_reference_does(
    rows: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    _same_compensation(rows, size, integers(bits, symmetric), seed)


@pytest.mark.slow
@settings(interpreted, max_examples=2)
@given(rows=few_rows, levels=st.sampled_from(OTHERS), blocks=st.sampled_from([1, 2]), seed=seeds)
def test_compensation_in_triton_takes_any_levels_and_several_blocks(
    rows: int, levels: Levels, blocks: int, seed: int
) -> None:
    _same_compensation(rows, 32, levels, seed, random_parameters(rows, blocks, levels, seed))


def _same_descent(rows: int, size: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import descent_triton

    weight_OI, gram_II = random_weight(rows, size, seed), random_gram(size, seed)
    if levels.movable:
        codes_OI, start = grids.round_to_range_reference(weight_OI, size, levels)
    else:
        start = random_parameters(rows, 1, levels, seed).each(lambda part: part[0])
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
@given(rows=few_rows, bits=st.integers(2, 4), symmetric=st.booleans(), seed=seeds)
def test_descent_in_triton_does_what_the_reference_does(rows: int, bits: int, symmetric: bool, seed: int) -> None:
    _same_descent(rows, 32, integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_descent_in_triton_takes_any_levels(rows: int, size: int, levels: Levels, seed: int) -> None:
    _same_descent(rows, size, levels, seed)


def _same_clip_losses(rows: int, size: int, num_blocks: int, levels: Levels, seed: int) -> None:
    from dsquant.kernels import clipping_triton

    weight_OI = random_weight(rows, num_blocks * size, seed)
    grams_BSS = torch.stack([random_gram(size, seed + block) for block in range(num_blocks)])
    if levels.movable:
        candidates = grids.range_parameters_reference(weight_OI, size, levels, CLIP_RATIOS)
    else:
        candidates = random_parameters(rows, num_blocks, levels, seed)
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
    _same_clip_losses(rows, size, 2, integers(bits, symmetric), seed)


@interpreted
@given(rows=few_rows, size=st.sampled_from([16, 32]), levels=st.sampled_from(OTHERS), seed=seeds)
def test_clip_search_in_triton_takes_any_levels(rows: int, size: int, levels: Levels, seed: int) -> None:
    _same_clip_losses(rows, size, 3, levels, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_searches_on_the_gpu_do_what_the_references_do(size: int, symmetric: bool) -> None:
    levels = integers(4, symmetric)
    _same_compensation(4100, size, levels, 5)
    _same_descent(4100, size, levels, 5)
    _same_clip_losses(1030, size, 9, levels, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("levels", OTHERS, ids=["table", "offsets", "fixed"])
@pytest.mark.parametrize(("size", "blocks"), [(128, 8), (256, 8), (32, 1)])
def test_searches_on_the_gpu_take_any_levels(size: int, blocks: int, levels: Levels) -> None:
    block = size // blocks
    _same_compensation(4100, size, levels, 5, random_parameters(4100, blocks, levels, 5))
    _same_descent(4100, block, levels, 5)
    _same_clip_losses(1030, block, 9, levels, 5)
    same_codes(coarse_weight(700, 11 * block, 5), random_parameters(700, 11, levels, 5), levels)
