"""dsquant's own K-quantizers, in PyTorch and Triton: beside ggml's, decoded by gguf-py."""

import os
import subprocess
import sys
import time

import pytest
import torch
from ggml_rows import KINDS, awkward_rows, decoded, weighted_error, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from dsquant.kernels import ggml, k_quants

TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_name", TYPES)
def test_the_weighted_error_is_within_one_percent_of_ggmls(type_name: str, kind: str) -> None:
    rows_RI, importance_I = weights(kind)
    ours, theirs = (
        weighted_error(quantize(rows_RI, type_name, importance_I), type_name, rows_RI, importance_I)
        for quantize in (k_quants.quantize, ggml.quantize)
    )
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_q8_0_is_ggmls_to_the_byte(kind: str) -> None:
    for rows_RI in (weights(kind)[0], awkward_rows()):
        ones_I = torch.ones(rows_RI.shape[1])
        assert torch.equal(k_quants.quantize(rows_RI, "Q8_0", ones_I), ggml.quantize(rows_RI, "Q8_0", ones_I))


@pytest.mark.parametrize("type_name", TYPES)
def test_awkward_blocks_decode_to_what_they_were(type_name: str) -> None:
    rows_RI, ones_I = awkward_rows(), torch.ones(768)
    values_RI = decoded(k_quants.quantize(rows_RI, type_name, ones_I), type_name)
    assert bool((values_RI[0] == 0).all()) and bool((values_RI[1, :256] == 0).all())
    assert torch.allclose(values_RI[3, :64], rows_RI[3, :64], rtol=0.02)
    assert torch.allclose(values_RI[4], rows_RI[4], atol=1e-3)
    by_ggml_RI = decoded(ggml.quantize(rows_RI, type_name, ones_I), type_name)
    for ours, theirs, wanted in zip(values_RI, by_ggml_RI, rows_RI, strict=True):
        assert float((ours - wanted).norm()) <= 1.1 * float((theirs - wanted).norm()) + 1e-3


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-2, 1e3),
    importance=st.floats(1e-18, 1e18),
    type_name=st.sampled_from(TYPES),
)
def test_the_unit_of_importances_changes_nothing(seed: int, scale: float, importance: float, type_name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_RI = torch.randn(3, 512, generator=generator) * scale
    importance_I = torch.rand(512, generator=generator) + 0.01
    stored = k_quants.quantize(rows_RI, type_name, importance_I)
    other = k_quants.quantize(rows_RI, type_name, importance_I * importance)
    errors = [weighted_error(found, type_name, rows_RI, importance_I) for found in (stored, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert errors[0] < {"Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03, "Q8_0": 0.01}[type_name]


def test_rows_that_are_worked_on_apart_are_those_worked_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_RI, importance_I = weights("gauss")
    together = k_quants.quantize(rows_RI, "Q4_K", importance_I)
    monkeypatch.setattr(k_quants, "WEIGHTS_AT_ONCE", 3000)
    assert float((k_quants.quantize(rows_RI, "Q4_K", importance_I) == together).float().mean()) > 0.999


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, see the tests for a GPU")
@pytest.mark.parametrize(
    ("type_name", "columns"),
    [
        *(pytest.param(name, 512, marks=pytest.mark.slow) for name in ("Q4_K", "Q5_K")),
        ("Q6_K", 768),
        ("Q8_0", 768),
    ],
)
def test_the_kernels_in_tritons_interpreter_do_what_the_reference_does(type_name: str, columns: int) -> None:
    from dsquant.kernels import k_quants_triton

    rows_RI = awkward_rows()[:, :columns].contiguous()
    importance_I = torch.randn(columns, generator=torch.Generator().manual_seed(3)).exp()
    stored = k_quants_triton.quantize(rows_RI, type_name, importance_I)
    check_against_reference(stored, type_name, rows_RI, importance_I)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """In a process of its own, where Triton does not interpret."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsquant.kernels import k_quants_triton as kernels

types = {"rows": "*fp32", "importance": "*fp32", "stored": "*u8"}
constants = [("_affine", {"S": 2, "HIGH": False}), ("_affine", {"S": 2, "HIGH": True}), ("_q6_k", {"S": 2})]
for name, chosen in [*constants, ("_q8_0", {"N": 16})]:
    function = getattr(kernels, name)
    signature = {name: "constexpr" if name in chosen else types.get(name, "i32") for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in chosen.items()}
    source = ASTSource(function, signature, places)
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": True}
    assert triton.compile(source, GPUTarget("cuda", 90, 32), options).asm["cubin"]
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


def check_against_reference(
    stored: torch.Tensor, type_name: str, rows_RI: torch.Tensor, importance_I: torch.Tensor
) -> None:
    """A kernel rounds its sums otherwise, so that a tie between candidates can end otherwise; no error grows by it."""
    reference = k_quants.quantize(rows_RI, type_name, importance_I)
    if type_name == "Q8_0":
        assert torch.equal(stored.cpu(), reference)
        return
    errors = [weighted_error(found, type_name, rows_RI, importance_I) for found in (stored, reference)]
    assert errors[0] <= 1.002 * errors[1]
    assert float((stored.cpu() == reference).float().mean()) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_name", TYPES)
def test_a_gpu_quantizes_as_the_reference_and_within_one_percent_of_ggml(type_name: str, kind: str) -> None:
    from dsquant.kernels import k_quants_triton

    awkward, (rows_RI, importance_I) = awkward_rows(), weights(kind, 129, 7168)
    stored = k_quants_triton.quantize(awkward.cuda(), type_name, torch.ones(768))
    check_against_reference(stored, type_name, awkward, torch.ones(768))
    stored = k_quants_triton.quantize(rows_RI.cuda(), type_name, importance_I)
    check_against_reference(stored, type_name, rows_RI, importance_I)
    theirs = ggml.quantize(rows_RI, type_name, importance_I)
    limit = 1.01 * weighted_error(theirs, type_name, rows_RI, importance_I)
    assert weighted_error(stored, type_name, rows_RI, importance_I) <= limit
    assert torch.equal(k_quants_triton.quantize(rows_RI.cuda(), type_name, importance_I), stored)


@pytest.mark.gpu
def test_a_gpu_quantizes_five_gigabytes_a_second_to_q4_k() -> None:
    from dsquant.kernels import k_quants_triton

    rows_RI, importance_I = torch.randn(2**15, 7168, device="cuda"), torch.rand(7168, device="cuda") + 0.1
    k_quants_triton.quantize(rows_RI, "Q4_K", importance_I)
    torch.cuda.synchronize()
    started = time.perf_counter()
    k_quants_triton.quantize(rows_RI, "Q4_K", importance_I)
    torch.cuda.synchronize()
    assert rows_RI.numel() * 4 / (time.perf_counter() - started) > 5e9
