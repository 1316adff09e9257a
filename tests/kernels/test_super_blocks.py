"""Compensation of ggml's blocks in PyTorch and in Triton."""

import pytest
import torch
from kernel_inputs import DEVICE, factor_of, random_gram, random_weight

from dsquant.kernels import grids, super_blocks
from dsquant.kernels.values import CompensatedBlocks
from dsquant.schemes.ggml_types import BLOCK_TYPES, GgmlType

RATIOS = (1.0, 0.95, 0.9)


def _inputs(scheme: GgmlType, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight_SO, factor_SS = random_weight(rows, columns, 1).T.contiguous(), factor_of(random_gram(columns, 1))
    return weight_SO, factor_SS, factor_SS.diagonal().square().reciprocal()


def _errors_are_those_of_the_codes(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, found: CompensatedBlocks, scheme: GgmlType
) -> None:
    """W - Q = U^T E."""
    parameters = found.parameters.each(lambda part: part.cpu())
    left_OS = -grids.dequantize_rows_reference(found.codes_SO.T.cpu(), parameters, scheme.levels, weight_SO.T)
    torch.testing.assert_close(factor_SS.triu().T @ found.errors_SO.cpu(), left_OS.T, rtol=1e-3, atol=1e-3)


def _agree(scheme: GgmlType, rows: int, columns: int) -> None:
    """Searches differ by the order of sums: a few blocks take a neighbour's scale, which errs as little."""
    from dsquant.kernels import super_blocks_triton

    inputs = _inputs(scheme, rows, columns)
    expected = super_blocks.compensate_blocks_reference(*inputs, scheme.shape, RATIOS)
    found = super_blocks_triton.compensate_blocks(*(part.to(DEVICE) for part in inputs), scheme.shape, RATIOS)
    assert float((found.codes_SO.cpu() == expected.codes_SO).float().mean()) > 0.9
    losses = (float(part.errors_SO.square().sum()) for part in (found, expected))
    assert next(losses) == pytest.approx(next(losses), rel=0.05 if rows < 100 else 0.01)
    _errors_are_those_of_the_codes(*inputs[:2], found, scheme)
    for parts, wanted in zip(found.parameters.super_scales, expected.parameters.super_scales, strict=True):
        assert parts.shape == wanted.shape
        torch.testing.assert_close(parts.cpu(), parts.cpu().half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", [pytest.param("Q4_0", marks=pytest.mark.slow), "Q5_1"])
def test_blocks_with_scales_of_their_own_are_compensated_alike_in_tritons_interpreter(name: str) -> None:
    _agree(BLOCK_TYPES[name], rows=9, columns=32 if name == "Q5_1" else 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "IQ4_XS"])
def test_super_blocks_are_compensated_alike_in_tritons_interpreter(name: str) -> None:
    _agree(BLOCK_TYPES[name], rows=9, columns=256)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_gpu_compensates_blocks_like_the_reference(name: str) -> None:
    _agree(BLOCK_TYPES[name], rows=300, columns=256)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_compensation_leaves_less_than_rounding_and_what_it_says_is_left(name: str) -> None:
    scheme = BLOCK_TYPES[name]
    weight_SO, factor_SS, importance_S = _inputs(scheme, 32, 256)
    found = super_blocks.compensate_blocks(weight_SO, factor_SS, importance_S, scheme.shape, RATIOS)
    _errors_are_those_of_the_codes(weight_SO, factor_SS, found, scheme)
    plain = grids.dequantize_rows(*scheme.round_plainly(weight_SO.T.contiguous()), scheme.levels, weight_SO.T)
    inverse_SS = torch.linalg.inv(factor_SS.triu().T)
    assert float(found.errors_SO.square().sum()) < 0.9 * float((inverse_SS @ plain.T).square().sum())
    for products, supers in zip(
        (found.parameters.scales, found.parameters.zero_points), found.parameters.super_scales, strict=False
    ):
        multiples = torch.where(supers != 0, products / supers, 0.0)
        torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-4)
