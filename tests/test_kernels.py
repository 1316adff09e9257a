"""Each kernel in PyTorch and in Triton: the two against each other, and PyTorch's against the modules that define it.

Without a GPU the Triton kernels run in Triton's interpreter (see conftest); scripts/test-gpu runs the same comparisons
on a GPU, in sizes that fill it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.kernels import clipping, compensation, grids
from dsquant.quantization.clip import SHRINKS
from dsquant.rounding import Grid, grid_parameters

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


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_searches_on_the_gpu_do_what_the_references_do(size: int, symmetric: bool) -> None:
    _same_compensation(4100, size, 4, symmetric, 5)
    _same_shrinks(1030, size, 9, 4, symmetric, 5)
