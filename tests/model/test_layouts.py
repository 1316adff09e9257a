"""The ways in which checkpoints are saved: what transformers writes, fused experts, wrappers, and MTP layers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FP8, save_checkpoint
from click.testing import CliRunner
from layouts import (
    CONFIG,
    Tensors,
    assert_same_tensors,
    assert_same_weights,
    awq,
    complete,
    fused,
    renamed,
    save,
    save_wrapped,
    small_tensors,
)
from safetensors.torch import load_file
from streams import stream_logits

import dsquant
from dsquant.cli import main
from dsquant.deployment.inspection import describe
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint


def test_what_transformers_saves_computes_what_transformers_computes(written: dict[str, Path]) -> None:
    import transformers

    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    for folder in written.values():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            wanted = model(tokens).logits
        found, _ = stream_logits(folder, open_checkpoint(folder).weights, tokens)
        assert torch.allclose(found, wanted, atol=1e-4)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(written["fused"] / "model.safetensors")


@pytest.mark.parametrize("mtp", ["quantize", "drop"])
def test_an_mtp_layer_that_is_announced_and_absent_is_taken_as_none(
    written: dict[str, Path], text_file: Path, tmp_path: Path, mtp: str
) -> None:
    result = awq(written["fused"], text_file, tmp_path / "out", mtp=mtp)
    (notice,) = [warning for warning in result.warnings if "multi-token" in warning]
    assert "announces 1" in notice and "hold none" in notice
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert dsquant.verify(tmp_path / "out", everything=True).ok


def test_a_gguf_file_of_it_has_no_nextn_layers(written: dict[str, Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    found = {}
    for name, folder in written.items():
        result = dsquant.gguf(
            folder, type="Q8_0", output=tmp_path / name, mtp="keep", calibration="none", evaluate=False, progress=False
        )
        assert any("hold none" in warning for warning in result.warnings)
        (file,) = (tmp_path / name).glob("*.gguf")
        reader = GGUFReader(file)
        assert int(reader.fields["deepseek2.block_count"].contents()) == 2
        assert not any("nextn" in key for key in reader.fields)
        found[name] = {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}
    assert found["plain"] == found["fused"]


@pytest.mark.parametrize("fp8", [False, True])
def test_fused_experts_are_the_experts_one_by_one(fp8: bool, tmp_path: Path) -> None:
    quantization = {"quantization_config": FP8} if fp8 else {}
    tensors = small_tensors(fp8)
    twin = save(tmp_path / "twin", tensors, **quantization)
    assert_same_weights(save(tmp_path / "fused", fused(tensors), **quantization), twin)


def test_one_expert_of_a_fused_tensor_is_read_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "fused", fused(small_tensors())))
    checkpoint.weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert checkpoint.index.bytes_read == 2 * 128 * 128


def test_fused_experts_give_the_files_of_single_ones_in_every_command(
    plain: Path, quantized: Path, text_file: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "fused", fused(small_tensors()))
    awq(model, text_file, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", quantized)
    assert dsquant.verify(tmp_path / "out", everything=True).ok
    assert dsquant.verify(quantized, source=str(model), everything=True).ok
    delta = dsquant.delta(
        plain, model, output=tmp_path / "delta", quantized=quantized, patch=tmp_path / "patch", progress=False
    )
    assert delta.changed == []
    assert_same_tensors(tmp_path / "delta", quantized)
    assert describe(str(model)).bytes_by_kind == describe(str(plain)).bytes_by_kind


# How text models are named inside others: body, head, and the word for a layer.
WRAPPERS = {
    "Kimi-K2.5's release": ("language_model.model.", "language_model.lm_head.", "layers."),
    "Kimi-K2.5 as transformers saves it": ("language_model.model.", "language_model.lm_head.", "blocks."),
    "transformers' own modules": ("model.language_model.", "lm_head.", "layers."),
    "a whole model inside": ("model.text_model.model.", "model.text_model.lm_head.", "layers."),
    "names of the text model alone": ("model.", "lm_head.", "layers."),
}


def wrapped_names(tensors: Tensors, kind: str) -> Tensors:
    body, head, layers = WRAPPERS[kind]
    return renamed(tensors, (r"^model\.layers\.", f"model.{layers}"), (r"^model\.", body), (r"^lm_head\.", head))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_text_model_inside_another_is_read_and_what_lies_beside_it_is_told(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    model = save_wrapped(tmp_path / "wrapped", wrapped_names(fused(small_tensors()), kind))
    assert_same_weights(model, plain)
    num_mtp_layers, (notice,) = complete(model)
    assert num_mtp_layers == 1
    assert "vision_tower (1 tensors)" in notice and "model.projector (1 tensors)" in notice


def test_a_wrapped_model_gives_the_files_of_the_text_model_alone(
    quantized: Path, text_file: Path, tmp_path: Path
) -> None:
    tensors = wrapped_names(fused(small_tensors()), "Kimi-K2.5's release")
    model = save_wrapped(tmp_path / "wrapped", tensors, model_type="deepseek_v3")
    result = awq(model, text_file, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", quantized)
    assert any("vision_tower" in warning for warning in result.warnings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert dsquant.verify(tmp_path / "out", everything=True).ok
    assert any("vision_tower" in note for note in dsquant.plan(str(model)).notes)
    found = dsquant.evaluate(
        model, tmp_path / "out", texts=("code",), samples=1, seq_len=32, prompts="none", output=tmp_path / "report",
        progress=False,
    )  # fmt: skip
    assert found.reference.architecture == "DeepseekV3ForCausalLM"


def test_what_transformers_saves_of_kimi_k25_is_read(tmp_path: Path) -> None:
    import transformers
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config

    seeing = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    inner = {key: CONFIG[key] for key in CONFIG if key != "architectures"}
    config = Kimi_K25Config(
        text_config=inner, vision_config=seeing, projection_hidden_size=32, tie_word_embeddings=False
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for folder, original in ((tmp_path / "original", True), (tmp_path / "modules", False)):
        model.save_pretrained(folder, save_original_format=original)
        assert complete(folder)[0] == 0
        weights = open_checkpoint(folder).weights
        wanted = model.model.language_model.layers[1].mlp.experts
        assert torch.equal(weights["model.layers.1.mlp.experts.3.up_proj.weight"], wanted.gate_up_proj[3, 128:].float())
        assert torch.equal(weights["model.layers.1.mlp.experts.3.down_proj.weight"], wanted.down_proj[3].float())


def decoder_layer_more(tensors: Tensors) -> Tensors:
    more = {name for name in tensors if re.search(r"layers\.2\.(embed|shared_head|eh_proj|enorm|hnorm)", name)}
    return {name: tensor for name, tensor in tensors.items() if name not in more}


def transposed(tensors: Tensors) -> Tensors:
    return {name: t.mT.contiguous() if "gate_up_proj" in name else t for name, t in fused(tensors).items()}


UNREAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one decoder layer more than config.json has": (decoder_layer_more, r"model\.layers\.2\..* is not part of"),
    "fused experts the other way round": (transposed, r"experts\.gate_up_proj'.* has shape \[64, 256\]"),
    "fused experts of another number": (
        lambda tensors: {name: t[:3].clone() if t.dim() == 3 else t for name, t in fused(tensors).items()},
        r"experts\.down_proj' has shape \[3, 128, 128\]; config\.json has 4 experts",
    ),
    "fused experts under other names": (
        lambda tensors: renamed(fused(tensors), ("gate_up_proj", "w13_weight"), (r"(experts\.)down_proj", r"\1w2")),
        r"experts\.w13_weight' is there instead of .*a layout that dsquant does not read",
    ),
    "two heads": (
        lambda tensors: tensors | {"model.lm_head.weight": torch.ones(300, 128)},
        r"are both 'lm_head\.weight'",
    ),
    "other names throughout": (
        lambda tensors: renamed(tensors, (r"model\.layers", "transformer.h")), "a layout that dsquant does not read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREAD)
def test_a_layout_that_is_not_read_is_named_and_nobody_is_sent_to_download_again(kind: str, tmp_path: Path) -> None:
    change, message = UNREAD[kind]
    model = save(tmp_path / "model", change(small_tensors()), num_nextn_predict_layers=0)
    with pytest.raises(InputError, match=message) as refused:
        complete(model)
    assert "download" not in str(refused.value)


def test_fp8_blocks_that_may_reach_from_gate_into_up_are_refused(tmp_path: Path) -> None:
    tensors = fused(small_tensors(fp8=True, moe_intermediate_size=240))
    model = save(tmp_path / "model", tensors, moe_intermediate_size=240, quantization_config=FP8)
    with pytest.raises(InputError, match=r"gate_up_proj' holds 2 linears of 240 rows in FP8 blocks of 128"):
        open_checkpoint(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_architecture_is_refused_before_anything_about_its_tensors(
    wrapped: bool, text_file: Path, tmp_path: Path
) -> None:
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 1}
    if wrapped:
        config = {"architectures": ["SeeingModel"], "model_type": "seeing", "text_config": config}
    model = save_checkpoint(tmp_path / "model", config, {"blocks": torch.zeros(4, 4, dtype=torch.uint8)}, 1)
    (model / "model-00001.safetensors").write_bytes(b"damaged")
    for command in ("awq", "gguf", "inspect", "plan", "eval"):
        more = [str(model)] if command == "eval" else ["--output", str(tmp_path / "out")] if command != "plan" else []
        more = [] if command in ("inspect", "plan") else more
        result = CliRunner().invoke(main, [command, str(model), *more])
        assert result.exit_code == 3 and ("gpt_oss" if wrapped else "GptOssForCausalLM") in result.output, command
        assert "is not supported" in result.output


def test_a_wrapper_that_leaves_out_its_text_models_sizes_is_refused(tmp_path: Path) -> None:
    model = save_wrapped(tmp_path / "model", small_tensors(), hidden_size=None)
    with pytest.raises(InputError, match="text_config lacks hidden_size"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (5, "quantization_config must be an object, found 5"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size must be two positive numbers"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": 5}},
            r"weights of schemes \[5\] cannot be read",
        ),
    ],
)
def test_a_malformed_quantization_config_is_refused_by_every_command(
    quantization: object, message: str, tmp_path: Path
) -> None:
    model = save(tmp_path / "model", small_tensors(), quantization_config=quantization)
    for command in ("awq", "inspect", "plan"):
        result = CliRunner().invoke(main, [command, str(model), *(["--dry-run"] if command == "awq" else [])])
        assert result.exit_code == 3 and re.search(message, " ".join(result.output.split())), result.output
