"""Weights rounded to ggml's code books: their bytes, gguf-py as judge, and compensation in PyTorch and in Triton."""

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, factor_of, random_gram, random_weight
from linear_inputs import correlated, moments_of

from dsquant.formats.gguf.block_bytes import packed
from dsquant.kernels import code_book_rounding, code_books, ggml, grids
from dsquant.kernels.code_books import TYPES, values_of
from dsquant.kernels.values import Parameters
from dsquant.quantization.compensate import _order
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import QuantizedWeight, quantized
from dsquant.schemes.ggml_types import GGML_TYPES

QUICK = ("IQ2_XXS", "IQ3_S")  # ggml takes many seconds to prepare others
by_type = pytest.mark.parametrize("name", TYPES)
quick_types = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)


def decoded(stored: torch.Tensor, name: str) -> torch.Tensor:
    values = dequantize(stored.numpy(), gguf_py.GGMLQuantizationType[name])
    return torch.from_numpy(np.array(values, dtype=np.float32))


def any_weight(name: str, seed: int, rows: int = 3, columns: int = 512) -> QuantizedWeight:
    """Any points under any scales, with even numbers of signs where a type stores no others."""
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)
    codes_AKP = code_book_rounding.codes_of_points(name)
    alternatives, num_points, width = codes_AKP.shape
    blocks = rows * columns // kind.block
    alternative_N1 = torch.randint(alternatives, (blocks, 1), generator=generator)
    index_NG = torch.randint(num_points, (blocks, kind.block // width), generator=generator)
    codes_N8 = codes_AKP[alternative_N1, index_NG].reshape(-1, 8)
    if kind.signs != "delta":
        negative_N8 = torch.rand(codes_N8.shape, generator=generator) < 0.5
        if kind.signs == "even":
            negative_N8[:, 0] ^= negative_N8.sum(1) % 2 == 1
        codes_N8 = torch.where(negative_N8, len(values_of(name)) - 1 - codes_N8, codes_N8)
    factor_SB = (torch.rand(rows * columns // 256, 1, generator=generator) + 1e-3).half().float()
    factor_SB = factor_SB.expand(-1, 256 // kind.block)
    scale_SB = factor_SB * (2 * torch.randint(kind.levels, factor_SB.shape, generator=generator) + 1)
    scale_OB, factor_OB = (part.reshape(rows, -1) for part in (scale_SB, factor_SB))
    parameters = Parameters(scale_OB, torch.zeros_like(scale_OB), (factor_OB,))
    return quantized(codes_N8.view(rows, columns), parameters, GGML_TYPES[name])


@by_type
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_any_points_signs_and_scales_are_read_back_by_gguf_py(name: str, seed: int) -> None:
    weight = any_weight(name, seed)
    stored = packed(weight)
    assert torch.equal(decoded(stored, name), weight.dequantize())
    factor_S, level_SB, _ = code_books.scales_of(stored.view(-1, TYPES[name].size), name)
    assert torch.equal((factor_S.unsqueeze(1) * (2 * level_SB + 1)).view_as(weight.scales_OG), weight.scales_OG)


@quick_types
def test_compensation_takes_a_quarter_of_the_error_that_ggml_leaves(name: str) -> None:
    moments = moments_of(correlated(2048, 512, 5))
    weight_OI = torch.randn(32, 512, generator=torch.Generator().manual_seed(6))
    theirs_OI = decoded(ggml.quantize(weight_OI, name, moments.rms_I.square()), name)
    alone, together = (rounded_weight(weight_OI, GGML_TYPES[name], moments, steps) for steps in ((), ("compensate",)))
    assert float(moments.loss(alone.difference(weight_OI))) < 1.02 * float(moments.loss(theirs_OI - weight_OI))
    assert float(moments.loss(together.difference(weight_OI))) < 0.75 * float(moments.loss(theirs_OI - weight_OI))
    assert torch.equal(decoded(packed(together), name), together.dequantize())


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("hostile", ["zeros", "no numbers", "huge", "inputs of zeros"])
def test_hostile_weights_and_inputs_end_no_process_and_leave_points(name: str, hostile: str) -> None:
    inputs_RI = correlated(512, 256, 5) * (hostile != "inputs of zeros")
    weight_OI = torch.randn(4, 256, generator=torch.Generator().manual_seed(6))
    weight_OI[1] *= {"zeros": 0.0, "no numbers": torch.nan, "huge": 1e30}.get(hostile, 1.0)
    found = rounded_weight(weight_OI, GGML_TYPES[name], moments_of(inputs_RI), ("compensate", "descend"))
    read_OI = decoded(packed(found), name)
    assert torch.equal(read_OI[[0, 2, 3]], found.dequantize()[[0, 2, 3]])
    assert bool(read_OI[[0, 2, 3]].isfinite().all())


def test_vectors_of_eight_stay_together_while_columns_are_sorted() -> None:
    order_I = _order(torch.rand(512, generator=torch.Generator().manual_seed(11)), GGML_TYPES["IQ2_S"])
    starts_N8 = order_I.unflatten(0, (-1, 8))
    assert torch.equal(starts_N8 - starts_N8[:, :1], torch.arange(8).expand(64, -1))
    assert not torch.equal(order_I, torch.arange(512))


def _agree(name: str, rows: int, columns: int) -> None:
    """Ties and the order of sums move a point here or there."""
    from dsquant.kernels import code_book_rounding_triton

    weight_SO, factor_SS = random_weight(rows, columns, 1).T.contiguous(), factor_of(random_gram(columns, 1))
    importance_S = factor_SS.diagonal().square().reciprocal()
    whole = (part.repeat(256 // columns, *[1] * (part.dim() - 1)) for part in (weight_SO, importance_S))
    whole_SO, whole_S = whole
    scales = code_book_rounding.block_scales(whole_SO.T.contiguous(), whole_S, name)
    wanted = code_book_rounding.compensate_points_reference(weight_SO, factor_SS, importance_S, scales, name)
    on_device = code_books.BlockScales(*(part.to(DEVICE) for part in vars(scales).values()))
    codes_AKP = code_book_rounding.codes_of_points(name).to(DEVICE)
    inputs = (part.to(DEVICE) for part in (weight_SO, factor_SS, importance_S))
    codes_SO, errors_SO = code_book_rounding_triton.compensate_points(*inputs, on_device, name, codes_AKP)
    assert float((codes_SO.cpu() == wanted[0]).float().mean()) > 0.97
    losses = [float(part.square().sum()) for part in (errors_SO, wanted[1])]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    blocks = columns // TYPES[name].block
    parameters = scales.parameters.each(lambda part: part[:, :blocks])
    levels = GGML_TYPES[name].levels
    left_OS = -grids.dequantize_rows_reference(codes_SO.T.cpu(), parameters, levels, weight_SO.T)
    torch.testing.assert_close(factor_SS.triu().T @ errors_SO.cpu(), left_OS.T, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, see the test for a GPU")
@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS"])
def test_points_are_compensated_alike_in_tritons_interpreter(name: str) -> None:
    _agree(name, rows=3, columns=32)


@pytest.mark.gpu
@by_type
def test_a_gpu_compensates_points_like_the_reference(name: str) -> None:
    _agree(name, rows=300, columns=256)
