"""Activations beside quantized weights of a GGUF file are rounded as ggml does it, and no others."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import add_tokenizer, full_model, make_pico_r1
from shapes import NARROW
from streams import stream_logits

import dsquant
from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.evaluation.code.generation import resident_model
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.kernels.activation_rounding import Rounding, bf16, q8_0, q8_k, unrounded
from dsquant.kernels.ggml import library
from dsquant.model.overlays import Overlay
from dsquant.source.weights import Weights

Q8_K_BYTES = 4 + 256 + 2 * 16  # a scale in F32, codes, sums of 16 codes


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    """Gaussian rows of many magnitudes, one with a block of zeros, one with equal numbers, one with halves."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(400, 1024, generator=generator) * torch.logspace(-4, 4, 400).unsqueeze(1)
    found[0, :256], found[1, :256], found[2, :256] = 0, 0.3, (torch.arange(256) - 127) / 2
    found[2, 31:256:32] = 127
    return found


def test_blocks_of_32_are_rounded_to_the_bit_as_gguf_py_does(values: torch.Tensor) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(q8_0(values).numpy(), gguf.dequantize(gguf.quantize(values.numpy(), kind), kind))


def test_blocks_of_256_are_rounded_to_the_bit_as_ggml_does(values: torch.Tensor) -> None:
    ggml = library()
    assert ggml is not None
    codes = torch.zeros(values.numel() // 256 * Q8_K_BYTES, dtype=torch.uint8)
    wanted = torch.empty_like(values)
    pointer, count = ctypes.c_void_p, ctypes.c_int64(values.numel())
    ggml.quantize_row_q8_K_ref(pointer(values.data_ptr()), pointer(codes.data_ptr()), count)
    ggml.dequantize_row_q8_K(pointer(codes.data_ptr()), pointer(wanted.data_ptr()), count)
    assert torch.equal(q8_k(values), wanted)


@pytest.mark.parametrize("rounding", [q8_0, q8_k])
def test_what_is_no_number_stays_none(rounding: Rounding) -> None:
    values = torch.ones(3, 512)
    values[0, 5], values[1, 300] = torch.nan, torch.inf
    assert rounding(values).isfinite().all(1).tolist() == [False, False, True]


@pytest.fixture(scope="module")
def candidates(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """tiny-r1 as AWQ, F32, BF16 and Q4_K_M, without calibration where there is a choice."""
    out = tmp_path_factory.mktemp("candidates")
    options = {"evaluate": False, "progress": False}
    dsquant.awq(tiny_r1, output=out / "AWQ", steps="none", samples=2, seq_len=64, **options)
    for name in ("F32", "BF16", "Q4_K_M"):
        dsquant.gguf(tiny_r1, type=name, output=out / name, calibration="none", **options)
    original = open_original(str(tiny_r1))
    return {path.name: open_candidate(str(path), original).weights for path in out.iterdir()}


@pytest.fixture(scope="module")
def tokens(tiny_r1: Path) -> torch.Tensor:
    return held_out_tokens("code", load_tokenizer(tiny_r1), 128, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AWQ", "F32"])
def test_other_candidates_score_as_transformers_whole_model_on_their_weights(
    name: str, candidates: dict[str, Weights], tiny_r1: Path, tokens: torch.Tensor
) -> None:
    weights = candidates[name]
    assert {weights.activation_quantizer(one) for one in weights} == {unrounded}
    with torch.no_grad():
        wanted = full_model(tiny_r1, weights)(tokens).logits
    assert torch.allclose(stream_logits(tiny_r1, weights, tokens)[0], wanted, atol=1e-3)


@pytest.mark.slow
def test_the_rounding_follows_the_stored_type(candidates: dict[str, Weights]) -> None:
    prefix = "model.layers.2"
    wanted = {
        "lm_head.weight": q8_k,
        f"{prefix}.mlp.experts.3.down_proj.weight": q8_k,
        f"{prefix}.mlp.shared_experts.up_proj.weight": q8_k,
        f"{prefix}.self_attn.q_b_proj.weight": q8_0,  # 192 columns: Q5_0
        f"{prefix}.mlp.gate.weight": unrounded,
        f"{prefix}.input_layernorm.weight": unrounded,
    }
    assert {name: candidates["Q4_K_M"].activation_quantizer(name) for name in wanted} == wanted
    of_bf16 = dict.fromkeys(wanted, bf16) | {name: unrounded for name in wanted if wanted[name] is unrounded}
    assert {name: candidates["BF16"].activation_quantizer(name) for name in wanted} == of_bf16


@pytest.mark.slow
def test_queries_are_rounded_beside_the_type_of_keys_and_mixed_latents_beside_that_of_values(
    tiny_r1: Path, tmp_path: Path
) -> None:
    file = dsquant.gguf(
        tiny_r1,
        type="BF16",
        tensor_types=["attn_k_b=Q8_0"],
        output=tmp_path / "out",
        calibration="none",
        evaluate=False,
        progress=False,
    )
    weights = open_candidate(str(file.output), open_original(str(tiny_r1))).weights
    name = "model.layers.2.self_attn.kv_b_proj.weight"
    assert [weights.activation_quantizer(name, values) for values in (False, True)] == [q8_0, bf16]


class Copied(Overlay):
    """The same weights for an engine that goes the way of rounding and keeps all digits."""

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        return torch.clone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AWQ", "Q4_K_M"])
def test_mixing_latents_is_the_same_as_mixing_values(
    name: str, candidates: dict[str, Weights], tiny_r1: Path, tokens: torch.Tensor
) -> None:
    skeleton = open_original(str(tiny_r1)).skeleton
    latents, values = Copied(candidates[name]), Unrounded(candidates[name])
    wanted = stream_logits(tiny_r1, values, tokens)[0]
    assert torch.allclose(stream_logits(tiny_r1, latents, tokens)[0], wanted, atol=1e-3)
    prompts, options = tokens[:, :100], {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = []
    for weights in (latents, values):  # with a cache, whose latents are those of all tokens before
        with torch.no_grad(), resident_model(skeleton, weights) as model:
            generated.append(model.generate(prompts, output_logits=True, return_dict_in_generate=True, **options))
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    assert torch.allclose(torch.stack(generated[0].logits), torch.stack(generated[1].logits), atol=1e-3)


class Unrounded(Overlay):
    """The same weights as another engine would run them."""

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        return unrounded


@pytest.mark.slow
def test_streaming_and_generation_round_alike(
    candidates: dict[str, Weights], tiny_r1: Path, tokens: torch.Tensor
) -> None:
    weights, skeleton = candidates["Q4_K_M"], open_original(str(tiny_r1)).skeleton
    rounded, plain = (stream_logits(tiny_r1, one, tokens)[0] for one in (weights, Unrounded(weights)))
    with torch.no_grad(), resident_model(skeleton, weights) as model:
        generated = model(tokens).logits
        assert (model(tokens[:, :40]).logits - generated[:, :40]).abs().mean() < 0.1
    assert float((generated - rounded).abs().median()) < 0.2 * float((plain - rounded).abs().median())
    # Nothing is left behind: the same modules run other weights as before.
    with torch.no_grad(), resident_model(skeleton, Unrounded(weights)) as model:
        assert torch.allclose(model(tokens).logits, plain, atol=1e-3)


@pytest.mark.slow
def test_a_jobs_end_and_an_evaluation_say_the_same_of_a_file(tmp_path: Path) -> None:
    one_layer = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    model = add_tokenizer(make_pico_r1(tmp_path / "model", **NARROW | one_layer))
    job = dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", calibration="none", progress=False)
    found = dsquant.evaluate(model, tmp_path / "out", texts=["code"], prompts="none", progress=False).candidates[0]
    (ours,) = job.divergence.values()
    assert ours["code"].mean_kl == pytest.approx(found.texts["code"].mean_kl.estimate, rel=0.01)
