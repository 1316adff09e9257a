"""A GGUF file computes the config's network in llama.cpp, or is refused before it is written; `eval` reads it so."""

import json
import math
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
import torch
from checkpoints import (
    LLAMA,
    PICO_R1,
    QWEN2,
    QWEN3,
    add_tokenizer,
    dense_shapes,
    full_model,
    make_dense,
    make_pico_r1,
    random_weights,
    save_checkpoint,
    stored,
)
from gguf_files import PLAIN, tensors_of, with_keys
from llama_cpp import every_position
from safetensors.torch import load_file, save_file

import dsquant
from dsquant.errors import InputError
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.opening import Original, open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.gguf_checkpoint import gguf_checkpoint, read_header
from dsquant.formats.gguf.loader import number_problem
from dsquant.formats.gguf.metadata import add_tokenizer_keys
from dsquant.model.families import FAMILIES
from dsquant.model.skeleton import Skeleton, network_config, network_rotary
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.shards import ShardIndex

ONE_LAYER = {"num_hidden_layers": 1}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# What yarn infers from the factor, and what R1-0528-Qwen3-8B multiplies it with: 1.0 is left.
INFERRED = 1 + 0.1 * math.log(4)
ATTN_FACTOR = 0.8782488562869419
LONGROPE = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
MLA_YARN: dict[str, Any] = PICO_R1["rope_scaling"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TOKENS_NT = torch.randint(6, 280, (1, 96), generator=torch.Generator().manual_seed(3))


def make(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """A small random checkpoint with a tokenizer."""
    if config["model_type"] == "deepseek_v3":
        changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, **changes}
        return add_tokenizer(make_pico_r1(folder, **{**config, **changes}), vocabulary=280)
    return add_tokenizer(make_dense(folder, {**config, **ONE_LAYER, **changes}), vocabulary=280)


def f32(model: Path, folder: Path) -> Path:
    """The model as a GGUF file without rounding."""
    return next(iter(dsquant.gguf(model, type="F32", output=folder, **PLAIN).folders.values()))


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


@pytest.fixture(scope="module")
def like_r1_0528(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Qwen3 with R1-0528-Qwen3-8B's scaling, and its GGUF file."""
    folder = tmp_path_factory.mktemp("r1-0528")
    model = make(folder / "model", QWEN3 | {"rope_scaling": YARN | {"attn_factor": ATTN_FACTOR}})
    return model, f32(model, folder / "out")


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


REFUSED = {
    "dynamic": (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' has no place in a GGUF"),
    "longrope": (LLAMA | {"rope_scaling": LONGROPE}, "'longrope' has no place"),
    "unknown type": (LLAMA | {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
    "llama3 outside of Llama": (QWEN3 | {"rope_scaling": LLAMA3}, "'llama3' has no place in a GGUF file of qwen3"),
    "beta_fast": (QWEN3 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 8}}, "beta_fast 32"),
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


LITE: dict[str, Any] = {
    "hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip


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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Original, Path]:
    """A small mixture as reference, and its GGUF file."""
    folder = tmp_path_factory.mktemp("mixture")
    model = make(folder / "model", PICO_R1)
    return open_original(str(model)), f32(model, folder / "out")


CHANGED_KEYS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "base": ({"deepseek2.rope.freq_base": 5000.0}, (), r"rope\.freq_base' is 5000\.0, .* needs 10000\.0"),
    "factor": ({"deepseek2.rope.scaling.factor": 4.0}, (), r"rope\.scaling\.factor' is 4\.0, .* needs 8\.0"),
    "no scaling": ({"deepseek2.rope.scaling.type": "none"}, (), r"rope\.scaling\.type' is 'none', .* needs 'yarn'"),
    "no multiplier": (
        {},
        ("deepseek2.rope.scaling.yarn_log_multiplier",),
        r"yarn_log_multiplier' is None, .* needs 0\.1",
    ),
    "magnitude": ({"deepseek2.rope.scaling.attn_factor": 0.5}, (), r"attn_factor' is 0\.5, .* needs None"),
    "epsilon": ({"deepseek2.attention.layer_norm_rms_epsilon": 1e-5}, (), "layer_norm_rms_epsilon"),
    "experts of a token": ({"deepseek2.expert_used_count": 1}, (), "expert_used_count' is 1, .* needs 2"),
    "scale of experts": ({"deepseek2.expert_weights_scale": 1.0}, (), r"expert_weights_scale' is 1\.0, .* needs 2\.5"),
    "norm of shares": ({}, ("deepseek2.expert_weights_norm",), "expert_weights_norm' is False, .* needs True"),
    "no groups": ({}, ("deepseek2.expert_group_count",), "expert_group_count' is 1, .* needs 4"),
    "softmax": ({"deepseek2.expert_gating_func": 1}, (), "expert_gating_func' is 1, .* needs 2"),
    "heads": ({"deepseek2.attention.head_count": 2}, (), "attention.head_count' is 2, .* needs 4"),
    "head width": ({"deepseek2.attention.key_length_mla": 96}, (), "key_length_mla' is 96, .* needs 128"),
    "dense layers": ({"deepseek2.leading_dense_block_count": 2}, (), "leading_dense_block_count' is 2"),
    "layers": ({"deepseek2.block_count": 1}, (), "block_count' is 1, .* needs 2"),
    "temperature": ({"deepseek2.attention.temperature_scale": 0.5}, (), "temperature_scale' is 0.5"),
    "unknown scaling": ({"deepseek2.rope.scaling.type": "su"}, (), "describe no rotary embedding"),
}


@pytest.mark.parametrize("name", CHANGED_KEYS)
def test_a_candidate_whose_keys_say_another_network_is_refused(
    mixture: tuple[Original, Path], tmp_path: Path, name: str
) -> None:
    original, file = mixture
    changes, without, message = CHANGED_KEYS[name]
    with pytest.raises(InputError, match=message):
        open_candidate(str(with_keys(file, tmp_path / "changed.gguf", changes, without)), original)


def test_keys_that_change_nothing_are_accepted(mixture: tuple[Original, Path], tmp_path: Path) -> None:
    original, file = mixture
    open_candidate(str(file), original)
    beside = {"deepseek2.context_length": 8192, "deepseek2.rope.scaling.yarn_beta_fast": 8.0}
    open_candidate(str(with_keys(file, tmp_path / "beside.gguf", beside)), original)


def test_linear_scaling_of_a_file_is_read_where_it_is_the_reference(tmp_path: Path) -> None:
    model = make(tmp_path / "model", LLAMA | {"rope_scaling": {"type": "linear", "factor": 4}})
    file = f32(model, tmp_path / "out")
    original = open_original(str(file))
    assert original.skeleton.config["rope_parameters"]["factor"] == 4.0
    open_candidate(str(model), original)  # and the checkpoint is the same network
    untyped = with_keys(file, tmp_path / "untyped.gguf", {}, ("llama.rope.scaling.type",))  # llama.cpp takes linear
    open_candidate(str(untyped), original)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    with pytest.raises(InputError, match="rope_parameters is"):
        open_candidate(str(model), original)


def with_tensor(file: Path, copy: Path, name: str, shape: tuple[int, ...]) -> Path:
    """Copies a GGUF file with one tensor more."""
    reader = gguf_py.GGUFReader(with_keys(file, copy, {}))
    writer = gguf_py.GGUFWriter(copy.with_suffix(".more.gguf"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf_py.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy.with_suffix(".more.gguf")


def test_a_candidate_with_a_tensor_that_the_reference_lacks_is_refused(
    like_r1_0528: tuple[Path, Path], tmp_path: Path
) -> None:
    model, file = like_r1_0528
    original = open_original(str(model))
    for name, shape in (("blk.0.attn_q.bias", (256,)), ("output.weight", (300, 256))):
        with pytest.raises(InputError, match=f"{name}' is not part of the network"):
            open_candidate(str(with_tensor(file, tmp_path / f"{name}.gguf", name, shape)), original)


@pytest.mark.parametrize("to", ["awq", "gguf:F32"])
@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (LLAMA, "model.layers.0.self_attn.q_proj.bias", "not part of LlamaForCausalLM as config.json describes it"),
        (LLAMA, "model.layers.0.mlp.up_proj.bias", "not part of"),
        (LLAMA, "model.layers.0.self_attn.q_norm.weight", "not part of"),
        (LLAMA, "model.layers.1.mlp.up_proj.weight", "not part of"),
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", "holds other frequencies"),
        (QWEN3, "lm_head.weight", "ties head and embedding, but tensor 'lm_head.weight' is not"),
    ],
)
def test_no_tensor_is_dropped_because_of_what_a_config_says(
    tmp_path: Path, text_file: Path, to: str, config: dict[str, Any], name: str, message: str
) -> None:
    config = config | ONE_LAYER
    shape = {"lm_head.weight": (300, 256), "model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}.get(name, (256,))
    tensors = stored(random_weights({**dense_shapes(config), name: shape}), fp8=False)
    model = add_tokenizer(save_checkpoint(tmp_path / "model", config, tensors), vocabulary=280)
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "out", to, text_file)
    assert not (tmp_path / "out").exists()


def quantize(model: Path, output: Path, to: str, text_file: Path) -> Any:
    if to == "gguf:F32":
        return dsquant.gguf(model, type="F32", output=output, **PLAIN)
    options = {"calibration": [text_file], "samples": 2, "seq_len": 32, "evaluate": False, "progress": False}
    return dsquant.awq(model, to=[to], group_size=64, output=output, **options)


def test_tensors_that_only_repeat_others_are_taken_with_a_notice(tmp_path: Path, text_file: Path) -> None:
    config = QWEN3 | ONE_LAYER
    tensors = stored(random_weights(dense_shapes(config)), fp8=False)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies.to(torch.bfloat16)
    model = add_tokenizer(save_checkpoint(tmp_path / "model", config, tensors), vocabulary=280)
    for to in ("awq", "gguf:F32"):
        result = quantize(model, tmp_path / to, to, text_file)
        assert any("lm_head.weight repeats the embedding" in warning for warning in result.warnings)
    assert "output.weight" not in tensors_of(tmp_path / "gguf:F32")


@pytest.mark.parametrize("fp8", [True, False])
def test_a_value_that_no_block_can_hold_is_found_while_the_source_is_hashed(tmp_path: Path, fp8: bool) -> None:
    model = make(tmp_path / "model", PICO_R1) if fp8 else make(tmp_path / "model", QWEN3)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = next(
        n for n in index["weight_map"] if n.endswith("down_proj.weight_scale_inv" if fp8 else "down_proj.weight")
    )
    path = model / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] *= 1e9
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"down_proj\.weight' has a value of"):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()  # nothing was begun
    dsquant.gguf(model, type="BF16", output=tmp_path / "bf16", **PLAIN)


@pytest.mark.parametrize(("number", "message"), [
    (300, "has the id 300"), (-1, "id -1"), ("7", "id '7'"), (7, "both the token 7"),
])  # fmt: skip
def test_token_ids_without_a_row_of_the_embedding_or_given_twice_are_refused(
    tmp_path: Path, number: Any, message: str
) -> None:
    model = make(tmp_path / "model", LLAMA)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<more>"] = number
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"tokenizer\.json.*" + message):
        dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN)


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", LLAMA)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": normalizer}))
        add_tokenizer_keys(gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama"), model, 300)
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": lower}))
    with pytest.raises(InputError, match=r"tokenizer\.json: its normalizer .*Lowercase"):
        add_tokenizer_keys(gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama"), model, 300)


def test_an_added_token_without_a_row_of_the_embedding_is_left_out_of_the_file(tmp_path: Path) -> None:
    writer = gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama")
    assert add_tokenizer_keys(writer, make(tmp_path / "model", LLAMA), 300) == []
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<pad>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = gguf_py.GGUFWriter(tmp_path / "more.gguf", "llama")
    assert add_tokenizer_keys(writer, tmp_path / "model", 300) == ["<pad>"]
    assert len(writer.kv_data[0]["tokenizer.ggml.tokens"].value) == 300
