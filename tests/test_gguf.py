"""GGUF files: every tensor against its source, types, splits, resume, importance matrices, refusals."""

import hashlib
import json
import struct
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
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.gguf_conversion import plan_gguf
from dsquant.kernels import ggml
from dsquant.recipe import GgufRecipe
from dsquant.source.checkpoint import open_checkpoint
from dsquant.source.gguf_layout import placements, stored_shape
from dsquant.writers.gguf import store
from dsquant.writers.gguf.types import BLOCKS, MIXTURES, choose_type, model_facts, row_bytes
from dsquant.writers.imatrix import (
    LEAST_SHARE,
    TensorImportance,
    column_importance,
    read_imatrix,
    write_imatrix,
)

PLAIN: dict[str, Any] = {"calibration": "none", "evaluate": False, "progress": False}
CALIBRATED: dict[str, Any] = {"samples": 6, "seq_len": 32, "evaluate": False, "progress": False}
# Relative root mean square error of each type on Gaussian weights is below this.
LARGEST_ERROR = {
    "F32": 0.0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 0.01, "Q4_0": 0.12, "Q4_1": 0.11, "Q5_0": 0.06, "Q5_1": 0.055,
    "Q2_K": 0.45, "Q3_K": 0.22, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.03, "IQ4_NL": 0.1, "IQ4_XS": 0.1,
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every tensor of every part, by gguf-py."""
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith("imatrix")]
    return {tensor.name: tensor for file in files for tensor in gguf_py.GGUFReader(file).tensors}


def decoded(tensor: Any) -> torch.Tensor:
    """A tensor's values, columns last."""
    values = dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape([int(n) for n in tensor.shape[::-1]])


def expected(folder: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Name -> values of every tensor that an R1 checkpoint becomes, worked out here and not by dsquant."""
    config, weights = json.loads((folder / "config.json").read_text()), open_checkpoint(folder).weights
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in range(num_layers):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        names = {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_output": "self_attn.o_proj",
        }  # fmt: skip
        kv_b = weights[f"{source}.self_attn.kv_b_proj.weight"].reshape(heads, nope + value, -1)
        found[f"{block}.attn_k_b.weight"] = torch.stack([kv_b[head, :nope].T for head in range(heads)])
        found[f"{block}.attn_v_b.weight"] = torch.stack([kv_b[head, nope:] for head in range(heads)])
        if layer < config["first_k_dense_replace"]:
            names |= {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
        else:
            names |= {f"ffn_{kind}_shexp": f"mlp.shared_experts.{kind}_proj" for kind in ("gate", "up", "down")}
            names["ffn_gate_inp"] = "mlp.gate"
            found[f"{block}.exp_probs_b.bias"] = weights[f"{source}.mlp.gate.e_score_correction_bias"]
            for kind in ("gate", "up", "down"):
                experts = range(config["n_routed_experts"])
                parts = [weights[f"{source}.mlp.experts.{number}.{kind}_proj.weight"] for number in experts]
                found[f"{block}.ffn_{kind}_exps.weight"] = torch.stack(parts)
        found |= {f"{block}.{name}.weight": weights[f"{source}.{module}.weight"] for name, module in names.items()}
    return found


@pytest.mark.parametrize("type_name", ["F32", "BF16", "F16", "Q8_0", "Q4_0", "Q2_K", "Q4_K_M", "Q4_K_M+", "IQ4_XS"])
def test_every_tensor_decodes_to_its_source_within_the_types_error(
    tiny_r1: Path, tmp_path: Path, type_name: str
) -> None:
    dsquant.gguf(tiny_r1, type=type_name, output=tmp_path / "out", **PLAIN)
    wanted, found = expected(tiny_r1, 4), tensors_of(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        values = decoded(tensor)
        assert values.shape == wanted[name].shape, name
        error = float((values - wanted[name]).norm() / wanted[name].norm())
        # tiny-r1 has outlier channels: blocks hold weights of several sizes, which doubles the error
        assert error <= 2 * LARGEST_ERROR[tensor.tensor_type.name], (name, tensor.tensor_type.name, error)


def test_rows_that_a_type_cannot_hold_take_the_documented_fallback_and_it_is_reported(
    pico_r1: Path, tmp_path: Path
) -> None:
    result = dsquant.gguf(pico_r1, type="Q4_K_M", output=tmp_path / "out", **PLAIN)
    found = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    assert found["blk.2.attn_q_b.weight"] == "Q5_0"  # 128 columns
    assert found["blk.2.attn_q_a.weight"] == "Q4_K"  # 256
    assert found["blk.4.ffn_down_exps.weight"] == "Q8_0"  # 192 columns, Q6_K wanted
    assert found["blk.2.attn_k_b.weight"] == "Q5_0"  # 64
    assert any("Q5_0 instead of Q4_K" in warning for warning in result.warnings)
    wanted = expected(pico_r1, 5)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert float((decoded(tensor) - wanted[name]).norm()) <= 0.13 * float(wanted[name].norm()), name


def test_odd_rows_become_f16() -> None:
    facts = model_facts(PICO_R1, 5, False)
    assert choose_type("blk.1.attn_q_a.weight", (8, 100), "Q4_K_M", facts, False) == ("F16", "Q4_K")


@pytest.mark.parametrize(
    ("mixture", "gigabytes"),
    [("Q4_K_M", 404.5), ("Q4_K_S", 380.1), ("Q5_K_M", 475.4), ("Q6_K", 550.9), ("Q8_0", 713.3)],
)
def test_r1_gets_the_types_and_the_size_that_llama_quantize_gives_it(mixture: str, gigabytes: float) -> None:
    """The sizes are `llama-quantize --dry-run`'s on R1's shapes."""
    config = R1 | {"num_nextn_predict_layers": 0}
    facts, total, seen = model_facts(config, 61, False), 0, dict[str, str]()
    for name, shape in r1_shapes(config).items():
        for placement in placements(name, "DeepseekV3ForCausalLM"):
            whole = stored_shape(shape, placement, config)
            chosen, _ = choose_type(placement.tensor, whole, mixture, facts, False)
            if placement.tensor not in seen:
                rows = int(np.prod(whole[:-1]))
                total += rows * row_bytes(chosen, whole[-1])
            seen[placement.tensor] = chosen
    assert len(seen) == 1086
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.06)
    if mixture == "Q4_K_M":
        assert total / 2**20 == pytest.approx(385_750.62, abs=0.01)
        raised = [name for name, chosen in seen.items() if "ffn_down_exps" in name and chosen == "Q6_K"]
        assert len(raised) == 27 and seen["blk.0.attn_k_b.weight"] == "Q5_0" and seen["output.weight"] == "Q6_K"


def test_r1_is_planned_from_headers_alone(tmp_path: Path) -> None:
    """In memory that any machine has: the fused experts of a layer of the network would be 30 GB."""
    model = make_r1_headers(tmp_path / "r1")
    recipe = GgufRecipe.checked(model=str(model), type="Q4_K_M", output=tmp_path / "out", calibration=(), device="cpu")
    target = plan_gguf(recipe.model_copy(update={"split_max_bytes": 48 * 2**30})).target
    assert len(target.tensors) == 1086 and len(target.files) == 8
    assert sum(tensor.num_bytes for tensor in target.tensors.values()) / 2**20 == pytest.approx(385_750.62, abs=0.01)
    assert all(sum(t.num_bytes for t in file.tensors) <= 48 * 2**30 for file in target.files)


def test_q4_k_m_plus_keeps_what_every_token_uses_at_8_bits(tiny_r1: Path, tmp_path: Path) -> None:
    dsquant.gguf(tiny_r1, type="Q4_K_M+", output=tmp_path / "out", **PLAIN)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    for part in ("attn_q_a", "attn_k_b", "attn_v_b", "attn_output", "ffn_up_shexp", "ffn_down_shexp"):
        assert types[f"blk.2.{part}.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q8_0" and types["blk.2.ffn_up_exps.weight"] == "Q4_K"


def test_types_can_be_overridden_by_pattern(tiny_r1: Path, tmp_path: Path) -> None:
    overrides = [r"blk\.[01]\.attn_output=q6_k", r"attn_output=F16"]
    dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", tensor_types=overrides, **PLAIN)
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "out").items()}
    assert types["blk.1.attn_output.weight"] == "Q6_K" and types["blk.2.attn_output.weight"] == "F16"


def test_split_files_hold_the_same_tensors_under_llama_cpps_names(tiny_r1: Path, tmp_path: Path) -> None:
    dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "one", **PLAIN)
    result = dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "many", split_max_size="1MiB", **PLAIN)
    files = sorted((tmp_path / "many").glob("*.gguf"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [
        f"tiny-r1-Q4_K_M-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)
    ]
    for number, file in enumerate(files):
        fields = gguf_py.GGUFReader(file).fields
        assert fields["split.no"].contents() == number and fields["split.count"].contents() == count
        data = sum(int(tensor.n_bytes) for tensor in gguf_py.GGUFReader(file).tensors)
        assert data <= 2**20 or len(gguf_py.GGUFReader(file).tensors) == 1
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert set(one) == set(many)
    assert all(np.array_equal(one[name].data, many[name].data) for name in one)
    assert result.output_bytes["gguf:Q4_K_M"] == sum(file.stat().st_size for file in files)


def test_a_dry_run_tells_every_file_to_the_byte_and_writes_nothing(tiny_r1: Path, tmp_path: Path) -> None:
    arguments = [
        "gguf",
        str(tiny_r1),
        "--type",
        "Q5_K_M",
        "--output",
        str(tmp_path / "out"),
        "--split-max-size",
        "2MiB",
    ]
    answer = CliRunner().invoke(main, [*arguments, "--calibration", "none", "--dry-run", "--json"])
    assert answer.exit_code == 0, answer.output
    planned = json.loads(answer.stdout)["output_bytes"]
    assert not (tmp_path / "out").exists()
    dsquant.gguf(tiny_r1, type="Q5_K_M", output=tmp_path / "out", split_max_size="2MiB", **PLAIN)
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
    tiny_r1: Path, tmp_path: Path, mtp: str
) -> None:
    result = dsquant.gguf(tiny_r1, type="Q8_0", output=tmp_path / "out", mtp=mtp, **PLAIN)
    names = set(tensors_of(tmp_path / "out"))
    kept = {"blk.4.nextn.eh_proj.weight", "blk.4.nextn.shared_head_norm.weight", "blk.4.attn_k_b.weight"}
    assert kept <= names if mtp == "keep" else not any(name.startswith("blk.4.") for name in names)
    assert any("multi-token" in warning for warning in result.warnings) == (mtp == "drop")


class _StopAfter:
    """Stops a job at its n-th report."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, _: Any) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Interrupted("the test stopped it")


@pytest.mark.parametrize("scales", [True, False])
def test_an_interrupted_conversion_resumes_to_the_same_bytes(
    pico_r1: Path, text_file: Path, tmp_path: Path, scales: bool
) -> None:
    from dsquant import pipeline

    def recipe(output: str) -> GgufRecipe:
        return GgufRecipe.checked(
            model=str(pico_r1), type="Q4_K_M", output=tmp_path / output, calibration=(str(text_file),), scales=scales,
            samples=6, seq_len=32, evaluate=False, split_max_bytes=400_000,
        )  # fmt: skip

    pipeline.gguf(recipe("whole"))
    steps, stops = len(open_checkpoint(pico_r1).index) + 20, 0
    while True:
        try:
            pipeline.gguf(recipe("parts"), resume=True, report=_StopAfter(steps))
            break
        except Interrupted:
            stops += 1
            steps = 25 + stops  # a resumed job does not scan; a layer has fewer reports than this
            finished, unfinished = (list((tmp_path / "parts").glob(ending)) for ending in ("*.gguf", "*.partial"))
            assert not (finished and unfinished), "nothing unfinished may bear its final name"
    assert 2 <= stops < 30

    def hashes(folder: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}

    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


def test_scales_lower_the_drift_where_channels_have_outliers(text_file: Path, tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model", outliers=True, moe_intermediate_size=256))
    errors = {}
    for scales in (True, False):
        out = tmp_path / str(scales)
        options = CALIBRATED | {"samples": 32}
        dsquant.gguf(model, type="Q4_K_M", output=out, calibration=str(text_file), scales=scales, **options)
        evaluation = dsquant.evaluate(
            model, out, texts=[text_file], seq_len=64, samples=4, prompts="none", progress=False
        )
        errors[scales] = evaluation.candidates[0].texts["text.txt"].mean_kl.estimate
    assert errors[True] < errors[False] / 2


def test_awq_and_gguf_come_from_one_calibration(pico_r1: Path, text_file: Path, tmp_path: Path) -> None:
    result = dsquant.awq(
        pico_r1, output=tmp_path / "out", to=["awq", "gguf:Q4_K_M"], group_size=64, calibration=(str(text_file),),
        **(CALIBRATED | {"evaluate": True}),
    )  # fmt: skip
    assert set(result.divergence) == {"awq", "gguf:Q4_K_M"}
    assert result.folders["gguf:Q4_K_M"] == tmp_path / "out" / "gguf" / "pico-r1-Q4_K_M.gguf"
    assert result.folders["gguf:Q4_K_M"].is_file() and (tmp_path / "out" / "gguf" / "imatrix.gguf").is_file()
    alone = dsquant.awq(
        pico_r1, output=tmp_path / "alone", to="awq", group_size=64, calibration=(str(text_file),), **CALIBRATED
    )
    for file in alone.folders["awq"].glob("*.safetensors"):
        assert file.read_bytes() == (result.folders["awq"] / file.name).read_bytes()


# --- quantizers


@pytest.mark.parametrize("type_name", sorted(ggml.TYPE_NUMBERS))
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


def test_type_numbers_and_blocks_are_ggmls() -> None:
    for name, number in ggml.TYPE_NUMBERS.items():
        assert gguf_py.GGMLQuantizationType[name] == number
    for name, sizes in BLOCKS.items():
        assert gguf_py.GGML_QUANT_SIZES[gguf_py.GGMLQuantizationType[name]] == sizes
    for name, (base, file_type) in MIXTURES.items():
        wanted = gguf_py.LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert name.removesuffix("+") == wanted and base in BLOCKS


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-2, 1e4), type_name=st.sampled_from(["Q8_0", "Q4_K", "Q6_K"]))
def test_any_row_decodes_within_its_types_error(seed: int, scale: float, type_name: str) -> None:
    rows_RI = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * scale
    stored = store.stored_rows(rows_RI, type_name, None)
    assert stored.shape == (4, row_bytes(type_name, 256))
    values = dequantize(stored.numpy(), gguf_py.GGMLQuantizationType[type_name])
    assert float((torch.from_numpy(values) - rows_RI).norm() / rows_RI.norm()) < 1.3 * LARGEST_ERROR[type_name]


# --- importance matrices


def test_an_imatrix_file_returns_what_was_written(tmp_path: Path) -> None:
    entries = {
        "blk.0.attn_q_a.weight": TensorImportance(torch.rand(1, 64), torch.tensor([10.0])),
        "blk.1.ffn_up_exps.weight": TensorImportance(torch.rand(4, 64), torch.tensor([3.0, 0.0, 9.0, 1.0])),
    }
    write_imatrix(tmp_path / "imatrix.gguf", entries, ["mix"], 8, 512)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert set(found) == set(entries)
    for name, entry in entries.items():
        assert torch.equal(found[name].sums_MI, entry.sums_MI) and torch.equal(found[name].counts_M, entry.counts_M)
    fields = gguf_py.GGUFReader(tmp_path / "imatrix.gguf").fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.chunk_size"].contents() == 512
    assert "general.architecture" not in fields


def test_rare_experts_shrink_towards_their_tensor_and_no_column_counts_nothing() -> None:
    sums_MI = torch.ones(3, 8) * torch.tensor([[1000.0], [0.0], [6.0]])
    sums_MI[0, 3] = 0.0
    entry = TensorImportance(sums_MI, torch.tensor([1000.0, 0.0, 2.0]))
    found = column_importance(entry)
    assert bool((found > 0).all()) and float(found[0, 3]) < 0.1
    pooled = float(sums_MI[:, 0].sum() / 1002)
    assert float(found[1, 0]) == pytest.approx(pooled)
    assert pooled < float(found[2, 0]) < 3.0 and float(found[2, 0]) - pooled < 0.2
    assert float(found[0, 0]) == pytest.approx(1.0, rel=0.01)
    single = column_importance(TensorImportance(torch.tensor([[4.0, 0.0]]), torch.tensor([2.0])))
    assert float(single[0, 0]) == 2.0 and float(single[0, 1]) == pytest.approx(LEAST_SHARE)
    unseen = column_importance(TensorImportance(torch.zeros(1, 4), torch.zeros(1)))
    assert torch.equal(unseen, torch.ones(1, 4))


def test_the_written_imatrix_makes_the_same_file_as_the_calibration_itself(
    tiny_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    options = CALIBRATED | {"samples": 24, "seq_len": 64}
    dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "a", calibration=str(text_file), scales=False, **options)
    dsquant.gguf(
        tiny_r1, type="Q4_K_M", output=tmp_path / "b", imatrix=tmp_path / "a" / "imatrix.gguf",
        evaluate=False, progress=False,
    )  # fmt: skip
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    for name in (
        "blk.2.attn_k_b.weight",
        "blk.2.attn_v_b.weight",
        "blk.1.attn_q_a.weight",
        "blk.3.ffn_up_shexp.weight",
    ):
        assert np.array_equal(first[name].data, second[name].data), name
    entry = read_imatrix(tmp_path / "a" / "imatrix.gguf")["blk.2.ffn_down_exps.weight"]
    assert entry.sums_MI.shape == (8, 256) and bool((entry.counts_M >= 256).all())


def legacy_imatrix(path: Path, entries: dict[str, list[float]], calls: int) -> Path:
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        encoded = name.encode()
        raw += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(values))
        raw += struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(raw)
    return path


def test_the_older_imatrix_format_is_read_too(tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "imatrix.dat", {"blk.0.attn_q_a.weight": [3.0, 6.0]}, calls=3)
    assert column_importance(read_imatrix(path)["blk.0.attn_q_a.weight"]).tolist() == [[1.0, 2.0]]


def test_an_imatrix_of_another_model_is_refused_by_name_and_shape(tiny_r1: Path, tmp_path: Path) -> None:
    other = legacy_imatrix(tmp_path / "other.dat", {"blk.0.attn_q_a.weight": [1.0] * 128}, calls=1)
    with pytest.raises(InputError, match=r"other\.dat.*blk\.0\.attn_q_a\.weight.*128 values.*another model"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=other, progress=False)
    deeper = legacy_imatrix(tmp_path / "deep.dat", {"blk.50.attn_q_a.weight": [1.0] * 256}, calls=1)
    with pytest.raises(InputError, match=r"blk\.50.*not in this model"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=deeper, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 3, 20, 200])
def test_a_corrupt_imatrix_is_refused(tiny_r1: Path, tmp_path: Path, cut: int) -> None:
    write_imatrix(
        tmp_path / "good.gguf", {"blk.0.attn_q_a.weight": TensorImportance(torch.ones(1, 256), torch.ones(1))}, [], 1, 1
    )
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "good.gguf").read_bytes()[:cut])
    with pytest.raises(InputError, match=r"bad\.gguf"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=tmp_path / "bad.gguf", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_imatrix_with_values_that_cannot_be_is_refused(tiny_r1: Path, tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "nan.dat", {"blk.0.attn_q_a.weight": [float("nan")] * 256}, calls=1)
    with pytest.raises(InputError, match="not finite"):
        dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "out", imatrix=path, progress=False)


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "Q9_K"}, "Q9_K.*unknown"),
        ({"type": "Q4_K_M", "tensor_types": ["attn"]}, "REGEX=TYPE"),
        ({"type": "Q4_K_M", "tensor_types": ["attn=Q7"]}, "REGEX=TYPE"),
        ({"type": "Q4_K_M", "tensor_types": ["(=Q8_0"]}, "no regular expression"),
    ],
)
def test_wrong_usage_is_refused(tiny_r1: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dsquant.gguf(tiny_r1, output=tmp_path / "out", **options, **PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    model = add_tokenizer(make_pico_r1(tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}],
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"tokenizer\.json.*pre-tokenizer is none of"):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", **PLAIN)


def test_without_ggml_dsquants_own_code_quantizes_and_says_so_and_other_types_are_refused(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    result = dsquant.gguf(tiny_r1, type="Q8_0", output=tmp_path / "q8", **PLAIN)
    assert json.loads((tmp_path / "q8" / "dsquant.json").read_text())["quantizer"] == "PyTorch and gguf-py"
    assert any("Q8_0 by dsquant's PyTorch code" in warning for warning in result.warnings)
    dsquant.gguf(tiny_r1, type="Q4_K_M", output=tmp_path / "q4", **PLAIN)
    wanted = expected(tiny_r1, 4)
    for name, tensor in tensors_of(tmp_path / "q4").items():
        limit = 2 * LARGEST_ERROR[tensor.tensor_type.name]
        assert float((decoded(tensor) - wanted[name]).norm()) <= limit * float(wanted[name].norm()), name
    with pytest.raises(UsageError, match=r"IQ4_XS.*pip install 'dsquant\[gguf\]'"):
        dsquant.gguf(tiny_r1, type="IQ4_XS", output=tmp_path / "iq4", **PLAIN)


def test_a_job_that_was_killed_while_its_files_got_their_names_resumes(pico_r1: Path, tmp_path: Path) -> None:
    from dsquant import pipeline
    from dsquant.telemetry import Progress

    out = tmp_path / "out"
    options = {"calibration": (), "evaluate": False, "split_max_bytes": 400_000}
    recipe = GgufRecipe.checked(model=str(pico_r1), type="Q4_K_M", output=out, **options)

    def stop_at_the_end(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done == progress.total:
            raise Interrupted("the test stopped it")

    with pytest.raises(Interrupted):
        pipeline.gguf(recipe, report=stop_at_the_end)
    files = sorted(out.glob("*.partial"))
    assert len(files) > 2
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    for file in files[1:]:
        file.rename(file.with_suffix(""))
    pipeline.gguf(recipe, resume=True)
    assert [hashlib.sha256(file.with_suffix("").read_bytes()).hexdigest() for file in files] == hashes
    assert (out / "dsquant.json").is_file() and not list(out.glob("*.partial"))


def test_a_job_is_not_resumed_with_another_quantizer(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsquant import pipeline

    recipe = GgufRecipe.checked(
        model=str(tiny_r1), type="Q8_0", output=tmp_path / "out", calibration=(), evaluate=False
    )
    with pytest.raises(Interrupted):
        pipeline.gguf(recipe, report=_StopAfter(len(open_checkpoint(tiny_r1).index) + 20))
    monkeypatch.setattr(store.ggml, "library", lambda: None)
    with pytest.raises(UsageError, match=r"quantizer ggml .*here is PyTorch"):
        pipeline.gguf(recipe, resume=True)
    monkeypatch.undo()
    pipeline.gguf(recipe, resume=True)


def test_a_gpu_that_is_not_there_is_refused(tiny_r1: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(UsageError, match="finds no GPU"):
        dsquant.gguf(tiny_r1, type="Q8_0", output=tmp_path / "out", device="cuda", **PLAIN)


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


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_dense_families_survive_the_way_to_gguf_and_back(
    tmp_path: Path, text_file: Path, config: dict[str, Any]
) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", config), vocabulary=280)
    dsquant.gguf(model, type="F32", output=tmp_path / "out", evaluate=False, progress=False)
    options = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    evaluation = dsquant.evaluate(model, tmp_path / "out", **options)
    assert evaluation.candidates[0].texts["text.txt"].mean_kl.estimate < 1e-9
