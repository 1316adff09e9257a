"""GGUF files: every tensor against its source, types, splits, keys, damage."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import torch
from checkpoints import (
    LLAMA,
    PICO_R1,
    QWEN2,
    QWEN3,
    R1,
    add_tokenizer,
    make_dense,
    make_pico_r1,
    make_r1_headers,
    r1_shapes,
)
from click.testing import CliRunner
from gguf_files import CALIBRATED, LARGEST_ERROR, PLAIN, decoded, expected, tensors_of
from safetensors.torch import load_file, save_file

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.gguf.gguf_checkpoint import read_header
from dsquant.formats.gguf.layout import placements, stored_shape
from dsquant.formats.gguf.mixtures import choose_type, model_facts
from dsquant.formats.gguf.output import GgufTarget
from dsquant.formats.gguf.types import MIXTURES, row_bytes
from dsquant.pipeline.inputs import open_source
from dsquant.recipes import gguf_recipe

# `test_schemes.py` reads blocks of the slow ones back by gguf-py too.
DECODED = ["F32", "BF16", "Q8_0", "Q4_K_M", "NVFP4"]
SLOWLY = ["F16", "Q4_0", "Q2_K", "Q4_K_M+", "IQ4_XS", "MXFP4_MOE"]


@pytest.mark.parametrize("type_name", [*DECODED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWLY)])
def test_every_tensor_decodes_to_its_source_within_the_types_error(
    nano_r1: Path, tmp_path: Path, type_name: str
) -> None:
    dsquant.gguf(nano_r1, type=type_name, output=tmp_path / "out", **PLAIN)
    wanted, found = expected(nano_r1, 2), tensors_of(tmp_path / "out")
    scales = {name: found.pop(name) for name in set(found) - set(wanted) if type_name == "NVFP4"}
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        values = decoded(tensor)
        scale = scales.get(name.replace(".weight", ".scale"))
        if scale is not None:
            values *= torch.from_numpy(scale.data.copy()).view(-1, *[1] * (values.dim() - 1))
        assert values.shape == wanted[name].shape, name
        error = float((values - wanted[name]).norm() / wanted[name].norm())
        assert error <= 1.3 * LARGEST_ERROR[tensor.tensor_type.name], (name, tensor.tensor_type.name, error)


@pytest.mark.parametrize(
    "type_name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_M", "IQ3_XXS")],
)
def test_types_of_code_books_are_written_with_calibration_and_decode(
    nano_r1: Path, tmp_path: Path, type_name: str
) -> None:
    dsquant.gguf(nano_r1, type=type_name, output=tmp_path / "out", scales=False, **CALIBRATED)
    wanted, types = expected(nano_r1, 2), set()
    for name, tensor in tensors_of(tmp_path / "out").items():
        types.add(tensor.tensor_type.name)
        error = float((decoded(tensor) - wanted[name]).norm() / wanted[name].norm())
        assert error <= 1.3 * LARGEST_ERROR[tensor.tensor_type.name], (name, tensor.tensor_type.name, error)
    assert MIXTURES[type_name] in types


def test_more_than_ten_experts_lie_in_their_order_whatever_the_order_of_names(tmp_path: Path) -> None:
    model = make_pico_r1(tmp_path / "model", num_hidden_layers=2, n_routed_experts=16, num_nextn_predict_layers=0)
    names = list(open_checkpoint(add_tokenizer(model)).weights)
    assert names.index("model.layers.1.mlp.experts.10.up_proj.weight") < names.index(
        "model.layers.1.mlp.experts.2.up_proj.weight"
    )
    dsquant.gguf(model, type="BF16", output=tmp_path / "out", **PLAIN)
    wanted, found = expected(model, 2), tensors_of(tmp_path / "out")
    for name in ("blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        assert float((decoded(found[name]) - wanted[name]).norm() / wanted[name].norm()) < LARGEST_ERROR["BF16"]


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_K_M"])
def test_a_value_that_a_type_cannot_hold_is_refused_by_name(nano_r1: Path, tmp_path: Path, type_name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
    path = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name] *= 1e12
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"experts\.3\.down_proj\.weight' has a value of .*; numbers or scales of"):
        dsquant.gguf(model, type=type_name, output=tmp_path / "out", **PLAIN)
    assert not list((tmp_path / "out").glob("*.gguf"))
    dsquant.gguf(model, type="BF16", output=tmp_path / "bf16", **PLAIN)


def test_rows_that_a_type_cannot_hold_take_the_documented_fallback_and_it_is_reported(
    nano_r1: Path, tmp_path: Path
) -> None:
    result = dsquant.gguf(nano_r1, type="Q4_K_M", output=tmp_path / "out", **PLAIN)
    found = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    assert found["blk.1.attn_q_b.weight"] == "Q5_0"  # 128 columns
    assert found["blk.1.attn_q_a.weight"] == "Q4_K"  # 256
    assert found["blk.1.ffn_down_exps.weight"] == "Q8_0"  # 192 columns, Q6_K wanted
    assert found["blk.1.attn_k_b.weight"] == "Q5_0"  # 64
    assert any("Q5_0 instead of Q4_K" in warning for warning in result.warnings)
    (note,) = read_header(next((tmp_path / "out").glob("*.gguf"))).notes  # what `eval` says of the file
    assert re.search(r"\d+ of \d+ matrices .* no multiple of 256 and are stored as .*Q5_0 and Q8_0", note), note
    wanted = expected(nano_r1, 2)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert float((decoded(tensor) - wanted[name]).norm()) <= 0.13 * float(wanted[name].norm()), name


def test_odd_rows_become_f16() -> None:
    facts = model_facts(PICO_R1, 5, False)
    assert choose_type("blk.1.attn_q_a.weight", (8, 100), "Q4_K_M", facts, False) == ("F16", "Q4_K")


R1_WITHOUT_MTP = R1 | {"num_nextn_predict_layers": 0}


@functools.cache
def r1_as_gguf() -> dict[str, tuple[int, ...]]:
    """Name -> shape of each of R1's tensors in a GGUF file."""
    return {
        placement.tensor: stored_shape(shape, placement, R1_WITHOUT_MTP)
        for name, shape in r1_shapes(R1_WITHOUT_MTP).items()
        for placement in placements(name, "DeepseekV3ForCausalLM")
    }


@pytest.mark.parametrize(
    ("mixture", "gigabytes"),
    [("Q4_K_M", 404.5), ("Q4_K_S", 380.1), ("Q5_K_M", 475.4), ("Q6_K", 550.9), ("Q8_0", 713.3)],
)
def test_r1_gets_the_types_and_the_size_that_llama_quantize_gives_it(mixture: str, gigabytes: float) -> None:
    """The sizes are `llama-quantize --dry-run`'s on R1's shapes."""
    facts, total, seen = model_facts(R1_WITHOUT_MTP, 61, False), 0, dict[str, str]()
    for name, whole in r1_as_gguf().items():
        seen[name], _ = choose_type(name, whole, mixture, facts, False)
        total += int(np.prod(whole[:-1])) * row_bytes(seen[name], whole[-1])
    assert len(seen) == 1086
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.06)
    if mixture == "Q4_K_M":
        assert total / 2**20 == pytest.approx(385_750.62, abs=0.01)
        raised = [name for name, chosen in seen.items() if "ffn_down_exps" in name and chosen == "Q6_K"]
        assert len(raised) == 27 and seen["blk.0.attn_k_b.weight"] == "Q5_0" and seen["output.weight"] == "Q6_K"


@pytest.mark.slow
def test_r1_is_planned_from_headers_alone(tmp_path: Path) -> None:
    """In memory that any machine has: the fused experts of a layer of the network would be 30 GB."""
    model = make_r1_headers(tmp_path / "r1")
    recipe = gguf_recipe(model=str(model), type="Q4_K_M", output=tmp_path / "out", calibration=(), device="cpu")
    (planned,) = open_source(recipe.model_copy(update={"split_max_bytes": 48 * 2**30})).plan.targets
    assert isinstance(planned, GgufTarget)
    target = planned.model
    assert len(target.tensors) == 1086 and len(target.files) == 8
    assert sum(tensor.num_bytes for tensor in target.tensors.values()) / 2**20 == pytest.approx(385_750.62, abs=0.01)
    assert all(sum(t.num_bytes for t in file.tensors) <= 48 * 2**30 for file in target.files)


def test_q4_k_m_plus_keeps_what_every_token_uses_at_8_bits(nano_r1: Path, tmp_path: Path) -> None:
    dsquant.gguf(nano_r1, type="Q4_K_M+", output=tmp_path / "out", **PLAIN)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    for part in ("attn_q_a", "attn_k_b", "attn_v_b", "attn_output", "ffn_up_shexp", "ffn_down_shexp"):
        assert types[f"blk.1.{part}.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q8_0" and types["blk.1.ffn_up_exps.weight"] == "Q4_K"


def test_types_can_be_overridden_by_pattern(nano_r1: Path, tmp_path: Path) -> None:
    overrides = [r"blk\.[0]\.attn_output=q6_k", r"attn_output=F16"]
    dsquant.gguf(nano_r1, type="Q8_0", output=tmp_path / "out", tensor_types=overrides, **PLAIN)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    assert types["blk.0.attn_output.weight"] == "Q6_K" and types["blk.1.attn_output.weight"] == "F16"


def test_split_files_hold_the_same_tensors_under_llama_cpps_names(nano_r1: Path, tmp_path: Path) -> None:
    dsquant.gguf(nano_r1, type="Q4_K_M", output=tmp_path / "one", **PLAIN)
    result = dsquant.gguf(nano_r1, type="Q4_K_M", output=tmp_path / "many", split_max_size="200KiB", **PLAIN)
    files = sorted((tmp_path / "many").glob("*.gguf"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"pico-r1-Q4_K_M-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    for number, file in enumerate(files):
        fields = gguf_py.GGUFReader(file).fields
        assert fields["split.no"].contents() == number and fields["split.count"].contents() == count
        data = sum(int(tensor.n_bytes) for tensor in gguf_py.GGUFReader(file).tensors)
        assert data <= 200 * 2**10 or len(gguf_py.GGUFReader(file).tensors) == 1
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert set(one) == set(many)
    assert all(np.array_equal(one[name].data, many[name].data) for name in one)
    assert result.output_bytes["gguf:Q4_K_M"] == sum(file.stat().st_size for file in files)


def test_a_dry_run_tells_every_file_to_the_byte_and_writes_nothing(nano_r1: Path, tmp_path: Path) -> None:
    arguments = [
        "gguf",
        str(nano_r1),
        "--type",
        "Q5_K_M",
        "--output",
        str(tmp_path / "out"),
        "--split-max-size",
        "400KiB",
    ]
    answer = CliRunner().invoke(main, [*arguments, "--calibration", "none", "--dry-run", "--json"])
    assert answer.exit_code == 0, answer.output
    planned = json.loads(answer.stdout)["output_bytes"]
    assert not (tmp_path / "out").exists()
    dsquant.gguf(nano_r1, type="Q5_K_M", output=tmp_path / "out", split_max_size="400KiB", **PLAIN)
    assert planned == {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.gguf")}


def test_keys_tell_llama_cpp_the_network(tiny_r1: Path, tmp_path: Path) -> None:
    dsquant.gguf(tiny_r1, type="Q8_0", output=tmp_path / "out", **PLAIN)
    fields = gguf_py.GGUFReader(tmp_path / "out" / "tiny-r1-Q8_0.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    config = json.loads((tiny_r1 / "config.json").read_text())
    assert found["general.architecture"] == "deepseek2" and found["general.file_type"] == 7
    assert found["deepseek2.attention.head_count_kv"] == 1
    assert found["deepseek2.attention.key_length"] == config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert found["deepseek2.attention.key_length_mla"] == config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    assert found["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert found["deepseek2.expert_gating_func"] == 2
    assert found["tokenizer.ggml.pre"] == "deepseek-v3" and found["tokenizer.ggml.add_bos_token"] is True
    assert "User" in found["tokenizer.chat_template"]
    assert len(found["tokenizer.ggml.tokens"]) == config["vocab_size"]


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_the_mtp_layer_becomes_nextn_tensors_or_is_left_out_with_a_word(
    nano_r1: Path, tmp_path: Path, mtp: str
) -> None:
    result = dsquant.gguf(nano_r1, type="Q8_0", output=tmp_path / "out", mtp=mtp, **PLAIN)
    names = set(tensors_of(tmp_path / "out"))
    kept = {"blk.2.nextn.eh_proj.weight", "blk.2.nextn.shared_head_norm.weight", "blk.2.attn_k_b.weight"}
    assert kept <= names if mtp == "keep" else not any(name.startswith("blk.2.") for name in names)
    assert any("multi-token" in warning for warning in result.warnings) == (mtp == "drop")


def test_a_damaged_gguf_candidate_is_refused(tiny_r1: Path, text_file: Path, tmp_path: Path) -> None:
    dsquant.gguf(tiny_r1, type="Q8_0", output=tmp_path / "out", **PLAIN)
    file = tmp_path / "out" / "tiny-r1-Q8_0.gguf"
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"short\.gguf is damaged"):
        dsquant.evaluate(tiny_r1, short, texts=[text_file], progress=False)
    other = add_tokenizer(make_pico_r1(tmp_path / "model"))
    with pytest.raises(InputError, match="a vocabulary of 1280 tokens, the reference's has 300"):
        dsquant.evaluate(other, file, texts=[text_file], progress=False)


@pytest.mark.parametrize(
    "config",
    [LLAMA, *(pytest.param(one, marks=pytest.mark.slow) for one in (QWEN2, QWEN3))],
    ids=["llama", "qwen2", "qwen3"],
)
def test_dense_families_survive_the_way_to_gguf_and_back(
    tmp_path: Path, text_file: Path, config: dict[str, Any]
) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", config), vocabulary=280)
    dsquant.gguf(model, type="F32", output=tmp_path / "out", evaluate=False, progress=False)
    options = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    evaluation = dsquant.evaluate(model, tmp_path / "out", **options)
    assert evaluation.candidates[0].texts["text.txt"].mean_kl.estimate < 1e-9
