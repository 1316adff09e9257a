"""A GGUF file computes the config's network in llama.cpp, or is refused before it is written; `eval` reads it so."""

import json
import math
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
import torch
from checkpoints import LLAMA, PICO_R1, QWEN2, QWEN3, full_model
from gguf_files import PLAIN
from gguf_models import ATTN_FACTOR, YARN, f32, make
from llama_cpp import every_position

import dsquant
from dsquant.errors import InputError
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.gguf_checkpoint import gguf_checkpoint, read_header
from dsquant.formats.gguf.loader import number_problem
from dsquant.model.families import FAMILIES
from dsquant.model.skeleton import Skeleton, network_config, network_rotary
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.shards import ShardIndex

# What yarn infers from the factor, and what R1-0528-Qwen3-8B multiplies it with: 1.0 is left.
INFERRED = 1 + 0.1 * math.log(4)
LONGROPE = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
MLA_YARN: dict[str, Any] = PICO_R1["rope_scaling"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TOKENS_NT = torch.randint(6, 280, (1, 96), generator=torch.Generator().manual_seed(3))


def predicted(model: Path, **stated: Any) -> torch.Tensor:
    """transformers' log-probabilities [N, T, V], its config stating something else where it is given."""
    config = json.loads((model / "config.json").read_text())
    (model / "stated").mkdir()
    (model / "stated" / "config.json").write_text(json.dumps(config | stated))
    with torch.no_grad():
        return full_model(model / "stated", open_checkpoint(model).weights)(TOKENS_NT).logits.double().log_softmax(-1)


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> float:
    return float((original_NTV.exp() * (original_NTV - candidate_NTV)).sum(-1).mean())


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}}, {"type": "linear", "factor": 4.0}),
        (QWEN3 | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, {"type": "linear"}),
        (QWEN3 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"original_context_length": 1024}),
        (LLAMA | {"rope_parameters": YARN | {"rope_theta": 5000.0}, "rope_theta": 5000}, {"type": "yarn"}),
        (QWEN2 | {"rope_scaling": YARN | {"attention_factor": 0.7}}, {"attn_factor": 0.7 / INFERRED}),
        (QWEN2 | {"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 1.5}}, {"type": "yarn"}),
        (LLAMA | {"attention_bias": True}, {}),
        (PICO_R1 | {"topk_group": 4}, {"type": "yarn"}),
        (PICO_R1 | {"rope_scaling": None, "rms_norm_eps": 1e-5}, {}),
    ],
    ids=lambda value: str(value.get("rope_scaling", value.get("rope_parameters"))) if isinstance(value, dict) else None,
)
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, config: dict[str, Any], keys: dict[str, Any]
) -> None:
    model = make(tmp_path / "model", config)
    file = f32(model, tmp_path / "out")
    fields = gguf_py.GGUFReader(file).fields
    architecture = fields["general.architecture"].contents()
    found = {key: fields[f"{architecture}.rope.scaling.{key}"].contents() for key in keys}
    assert found == {key: value if isinstance(value, str) else pytest.approx(value) for key, value in keys.items()}
    assert divergence(predicted(model), every_position(file, TOKENS_NT)) < 1e-5


@pytest.mark.parametrize(
    ("stated", "magnitude"),
    [
        ({"attn_factor": ATTN_FACTOR}, 1.0),
        ({"attn_factor": ATTN_FACTOR, "attention_factor": 1.0}, 1.0),
        ({"attention_factor": 0.9}, 0.9),
        ({"apply_yarn_scaling": False}, 1.0),
        ({"apply_yarn_scaling": False, "attn_factor": 0.8}, 0.8),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (1 + 0.2 * math.log(4)) / INFERRED),
        ({"mscale": 2.0, "mscale_all_dim": 1.0, "attn_factor": 0.5}, 0.5 * (1 + 0.2 * math.log(4)) / INFERRED),
        ({}, INFERRED),
    ],
)  # fmt: skip
def test_yarn_is_as_large_as_the_config_says_wherever_it_says_it(stated: dict[str, Any], magnitude: float) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        config = QWEN3 | {field: YARN | stated}
        skeleton = Skeleton(Checkpoint(Path(), config, ShardIndex(Path(), {}), {}))  # type: ignore[arg-type]
        assert skeleton.model.model.rotary_emb.attention_scaling == pytest.approx(magnitude, rel=1e-5)
        assert network_rotary(FAMILIES["Qwen3ForCausalLM"], config).magnitude == pytest.approx(magnitude, rel=1e-5)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (YARN | {"attn_factor": 0.8, "attention_factor": 1.0}, "attention_factor 1.0 contradicts attn_factor 0.8"),
        (YARN | {"extrapolation_factor": 0.5}, "extrapolation_factor"),
        (YARN | {"attn_factor": "large"}, "attn_factor 'large', expected a number above 0"),
        ({"type": "linear", "factor": 4.0, "attn_factor": 0.8}, "belong to yarn"),
        ({"type": "linear", "rope_type": "yarn", "factor": 4.0}, "type 'linear' and the rope_type 'yarn'"),
        ({"type": "linear", "factor": 4.0, "rope_theta": 7.0}, "rope_theta is stated more than once"),
    ],
)
def test_contradictions_about_rotary_embeddings_are_refused(tmp_path: Path, rope: dict[str, Any], message: str) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        config = QWEN3 | {field: rope}
        with pytest.raises(InputError, match=message):
            Skeleton(Checkpoint(tmp_path, config, ShardIndex(tmp_path, {}), {}))  # type: ignore[arg-type]


def test_r1_0528_qwen3_8b_keeps_its_magnitude_in_dsquant_and_in_llama_cpp(
    like_r1_0528: tuple[Path, Path], tmp_path: Path
) -> None:
    model, file = like_r1_0528
    wanted_NTV = predicted(model, rope_scaling=YARN | {"attention_factor": 1.0})
    key = gguf_py.GGUFReader(file).fields["qwen3.rope.scaling.attn_factor"].contents()
    assert key == pytest.approx(1 / INFERRED, rel=1e-5)
    assert divergence(wanted_NTV, every_position(file, TOKENS_NT)) < 1e-5
    original = open_original(str(model))
    weights = {"file": open_candidate(str(file), original).weights}
    models = ComparedModels(original.skeleton, original.checkpoint.weights, weights, 4)
    scores = compare(models, TOKENS_NT, tmp_path)["file"].summary()
    ours = float((-wanted_NTV[:, :-1].gather(2, TOKENS_NT[:, 1:, None]).mean()).exp())
    assert scores.perplexity_original == pytest.approx(ours, rel=1e-5) and scores.mean_kl < 1e-9
    assert Skeleton(gguf_checkpoint(read_header(file))).model.model.rotary_emb.attention_scaling == pytest.approx(1.0)


LITE: dict[str, Any] = {
    "hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
KIMI_K2 = LITE | {
    "num_hidden_layers": 1, "num_nextn_predict_layers": 0,
    "rope_theta": 50000,
    "rope_scaling": MLA_YARN | {"factor": 32.0, "beta_fast": 1.0, "original_max_position_embeddings": 4096},
}  # fmt: skip


def test_kimi_k2_tells_how_llama_cpp_has_to_be_started(tmp_path: Path) -> None:
    """It reads yarn's bounds from no file: by default another network is computed."""
    model, option = make(tmp_path / "model", PICO_R1 | KIMI_K2), "--yarn-beta-fast 1"
    result = dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN)
    assert any(option in warning for warning in result.warnings)
    assert f".gguf {option}\n" in (tmp_path / "out" / "README.md").read_text()
    assert option in " ".join(str(result).split()).partition("serve it with:")[2]  # lines break where the path ends
    (file,) = result.folders.values()
    wanted_NTV = predicted(model)
    assert divergence(wanted_NTV, every_position(file, TOKENS_NT, beta_fast=1.0)) < 1e-5
    assert divergence(wanted_NTV, every_position(file, TOKENS_NT)) > 1e-3
    open_candidate(str(file), open_original(str(model)))
    open_candidate(str(model), open_original(str(file)))  # and a file alone says it too


REFUSED = {
    "dynamic": (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' has no place in a GGUF"),
    "longrope": (LLAMA | {"rope_scaling": LONGROPE}, "'longrope' has no place"),
    "unknown type": (LLAMA | {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
    "llama3 outside of Llama": (QWEN3 | {"rope_scaling": LLAMA3}, "'llama3' has no place in a GGUF file of qwen3"),
    "truncate": (QWEN3 | {"rope_scaling": YARN | {"truncate": False}}, "truncate for granted"),
    "unread key": (QWEN3 | {"rope_scaling": YARN | {"mrope_section": [16, 8, 8]}}, "does not read mrope_section"),
    "part of a head": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "MLA linear": (PICO_R1 | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear' has no place"),
    "MLA mscale": (PICO_R1 | {"rope_scaling": MLA_YARN | {"mscale": 0.7}}, "mscale is mscale_all_dim"),
    "MLA without mscale": (PICO_R1 | {"rope_scaling": YARN}, "mscale is mscale_all_dim"),
    "MLA magnitude": (PICO_R1 | {"rope_scaling": MLA_YARN | {"attn_factor": 0.9}}, "magnitude 1 instead"),
    "MLA halves": (PICO_R1 | {"rope_interleave": False}, "rope_interleave"),
    "MLA halves, by null": (PICO_R1 | {"rope_interleave": None}, "rope_interleave"),
    "MLA epsilon": (PICO_R1 | {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
    "MLA biases": (PICO_R1 | {"attention_bias": True}, "no place for tensor 'model.layers.0.self_attn.kv_a"),
    "MLA without q_lora": (PICO_R1 | {"q_lora_rank": None}, "q_lora_rank None with 2 layers"),
    "activation": (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "window": (LLAMA | {"sliding_window": 8}, "sliding_window 8"),
    "window by layer": (QWEN2 | {"layer_types": ["sliding_attention"]}, "layer_types"),
    "logit scale": (LLAMA | {"logit_scale": 0.5}, "logit_scale 0.5"),
    "Qwen2's heads": (QWEN2 | {"head_dim": 32}, "hidden_size 256 divided"),
    "Qwen3's bias": (QWEN3 | {"attention_bias": True}, "no place for tensor 'model.layers.0.self_attn.o_proj.bias'"),
}  # fmt: skip


OTHER_NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": (QWEN3 | {"is_causal": False}, "is_causal False"),
    "MLA width of a head": (PICO_R1 | {"head_dim": 32}, "head_dim 32 is not qk_rope_head_dim"),
    "MLA heads of keys": (PICO_R1 | {"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads"),
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_what_no_network_of_the_family_computes_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, message = OTHER_NETWORKS[name]
    model = make(tmp_path / "model", config)
    with pytest.raises(InputError, match=message):
        dsquant.inspect(model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_not_compute_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, message = REFUSED[name]
    model = make(tmp_path / "model", config)
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_plan_names_gguf_among_what_cannot_be_made_and_goes_on(tmp_path: Path) -> None:
    model = make(tmp_path / "model", LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    plan = dsquant.plan(model, gpu="1x24GiB")
    assert any("gguf" in text and "'dynamic'" in text for text in plan.as_json()["refused"])


@pytest.mark.slow
def test_layer_counts_by_which_llama_cpp_knows_lite_models_are_refused_with_q_lora(tmp_path: Path) -> None:
    """It looks for `attn_q` there: the same model without q_lora is one of them."""
    config = PICO_R1 | LITE | {"num_hidden_layers": 27, "first_k_dense_replace": 26}
    with pytest.raises(InputError, match="q_lora_rank 32 with 27 layers"):
        f32(make(tmp_path / "model", PICO_R1, **config), tmp_path / "out")
    model = make(tmp_path / "lite", PICO_R1, **config | {"q_lora_rank": None})
    assert divergence(predicted(model), every_position(f32(model, tmp_path / "lite-out"), TOKENS_NT)) < 1e-5
    network = network_config(FAMILIES["DeepseekV3ForCausalLM"], config)
    refused = [
        n
        for n in range(20, 62)
        if number_problem(FAMILIES["DeepseekV3ForCausalLM"].gguf, network | {"num_hidden_layers": n})
    ]
    assert refused == [26, 27]
