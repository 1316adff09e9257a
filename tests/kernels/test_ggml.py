"""ggml's quantizers through xllamacpp, and gguf-py as their judge."""

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from gguf_files import LARGEST_ERROR
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.formats.gguf import store
from dsquant.formats.gguf.types import FLOAT_TYPES, MIXTURES, TYPES, file_type_of, row_bytes
from dsquant.kernels import ggml
from dsquant.schemes.ggml_types import BLOCK_TYPES

# --- quantizers


PREPARED_FOR_SECONDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")  # ggml works out tables first


@pytest.mark.parametrize(
    "type_name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in PREPARED_FOR_SECONDS else ())
        for name in TYPES
        if name not in FLOAT_TYPES
    ],
)
def test_threads_change_no_byte_and_gguf_py_decodes_them(type_name: str) -> None:
    rows_RI = torch.randn(37, 512, generator=torch.Generator().manual_seed(1))
    importance_I = torch.rand(512, generator=torch.Generator().manual_seed(2)) + 0.1
    one, four = (ggml.quantize(rows_RI, type_name, importance_I, threads) for threads in (1, 4))
    assert torch.equal(one, four)
    values = dequantize(one.numpy(), gguf_py.GGMLQuantizationType[type_name])
    error = float((torch.from_numpy(values) - rows_RI).norm() / rows_RI.norm())
    assert error < LARGEST_ERROR[type_name]


def test_q8_0_bytes_equal_gguf_pys_own() -> None:
    rows_RI = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    wanted = gguf_py.quants.quantize(rows_RI.numpy(), gguf_py.GGMLQuantizationType.Q8_0)
    assert np.array_equal(ggml.quantize(rows_RI, "Q8_0", torch.ones(256)).numpy(), wanted)


def test_rows_and_file_types_are_ggmls() -> None:
    assert row_bytes("Q4_K", 7168) == 28 * 144 and row_bytes("Q8_0", 64) == 68
    assert [file_type_of(name) for name in ("F32", "Q4_K_M", "Q4_K_M+", "IQ4_XS")] == [0, 15, 15, 30]
    for name, base in MIXTURES.items():
        assert file_type_of(name) in set(gguf_py.LlamaFileType) and base in TYPES


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-2, 1e4), type_name=st.sampled_from(["Q8_0", "Q4_K", "Q6_K"]))
def test_any_row_decodes_within_its_types_error(seed: int, scale: float, type_name: str) -> None:
    rows_RI = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * scale
    stored = store.stored_rows(rows_RI, type_name, None)
    assert stored.shape == (4, row_bytes(type_name, 256))
    values = dequantize(stored.numpy(), gguf_py.GGMLQuantizationType[type_name])
    assert float((torch.from_numpy(values) - rows_RI).norm() / rows_RI.norm()) < 1.3 * LARGEST_ERROR[type_name]


@pytest.mark.parametrize("type_name", ["IQ3_XXS", "MXFP4"])
def test_importances_of_any_size_never_end_the_process(type_name: str) -> None:
    rows_RI = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)) * 1e4
    huge_I = torch.rand(256, generator=torch.Generator().manual_seed(2)) * 3e38 + 1e34
    stored = store.stored_rows(rows_RI, type_name, huge_I)
    assert torch.equal(stored, store.stored_rows(rows_RI, type_name, huge_I / 2.0**120))
    assert float((store.decoded_rows(stored, type_name) - rows_RI).norm() / rows_RI.norm()) < LARGEST_ERROR[type_name]


def test_code_books_are_searched_by_pytorch_where_ggml_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_RI = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    stored = store.stored_rows(rows_RI, "IQ2_XXS", None)
    error = float((store.decoded_rows(stored, "IQ2_XXS") - rows_RI).norm() / rows_RI.norm())
    assert error < LARGEST_ERROR["IQ2_XXS"]
    note = store.check_quantizer({"IQ2_XXS", "Q4_K", "MXFP4"}, on_gpu=False, has_importances=True)
    assert note is not None and "IQ2_XXS, Q4_K, more slowly, and a hundred times as slowly for IQ2_XXS" in note
    assert "MXFP4" not in note
    assert store.check_quantizer({"IQ2_XXS", "Q4_K"}, on_gpu=True, has_importances=True) is None


@pytest.mark.parametrize("type_name", sorted(BLOCK_TYPES))
@pytest.mark.parametrize("weighted", [True, False])
def test_what_a_gpu_stores_errs_no_more_than_ggmls_rows(
    type_name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows_RI, importance_I = torch.randn(16, 512, generator=generator), None
    if weighted:
        importance_I = torch.exp(torch.randn(512, generator=generator)) * 1e30
    by_ggml = store.stored_rows(rows_RI, type_name, importance_I)
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    own = store.stored_rows(rows_RI, type_name, importance_I)
    assert own.shape == by_ggml.shape
    weights_I = torch.ones(512) if importance_I is None else importance_I / 1e30
    own_error, error = (
        float(((store.decoded_rows(stored, type_name) - rows_RI).square() * weights_I).sum())
        for stored in (own, by_ggml)
    )
    assert own_error < 1.01 * error
