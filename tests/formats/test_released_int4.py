"""Kimi-K2-Thinking's 4 bits as a source: read as floats, kept code by code in GGUF's Q4_0 and in compressed-tensors."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf_files import PLAIN, decoded, tensors_of
from llama_cpp import every_position
from random_models import shapes_of, whole_logits
from released_int4 import KIMI, PREFIX, in_float32, make
from safetensors.torch import load_file, save_file
from small_jobs import FAST
from streams import randomly_folded, stream_logits

import dsquant
from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError, UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.scales import open_scales, recorded_fold
from dsquant.model.overlays import Fold, FoldedWeights
from dsquant.model.skeleton import Skeleton


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    return make(tmp_path_factory.mktemp("kimi") / "model")


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["K2-Thinking", "K2.5"])
def test_experts_are_read_as_floats(tmp_path: Path, prefix: str) -> None:
    model, values = make(tmp_path / "model", prefix)
    weights = open_checkpoint(model).weights
    assert all(torch.equal(weights[name], wanted) for name, wanted in values.items())
    assert dsquant.inspect(model).parameters == sum(np.prod(shape) for shape in shapes_of(KIMI).values())


def test_scales_that_q4_0_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "model")
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        huge = {name: tensor * 0 + 1e6 for name, tensor in tensors.items() if "experts.1.up_proj.weight_scale" in name}
        save_file(tensors | huge, shard)
    with pytest.raises(InputError, match=r"experts\.1\.up_proj\.weight' has a value of 9.99e\+05; .*Q4_0"):
        dsquant.gguf(model, type="Q8_0", tensor_types=["_exps=Q4_0"], output=tmp_path / "out", **PLAIN)


def test_q4_0_has_the_very_codes_and_scales(kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    model, values = kimi
    output = tmp_path / "out"
    dsquant.gguf(model, type="Q8_0", tensor_types=["_exps=Q4_0"], output=output, **PLAIN)
    tensors = tensors_of(output)
    for kind in ("gate", "up", "down"):
        tensor = tensors[f"blk.1.ffn_{kind}_exps.weight"]
        assert tensor.tensor_type == gguf_py.GGMLQuantizationType.Q4_0
        experts = [values[f"model.layers.1.mlp.experts.{number}.{kind}_proj.weight"] for number in range(4)]
        assert torch.equal(decoded(tensor), torch.stack(experts))
    assert dsquant.verify(output, source=model, progress=False).ok


def test_other_types_and_formats_are_made_of_it(
    kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, text_file: Path
) -> None:
    output, formats = tmp_path / "out", ["compressed-tensors", "gguf:Q8_0"]
    dsquant.awq(kimi[0], to=formats, calibration=[str(text_file)], output=output, **FAST | {"bits": 3})
    assert dsquant.verify(output, source=kimi[0], progress=False).ok
    bits = json.loads((output / formats[0] / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in bits.values()] == [3]


TOKENS_NT = torch.randint(6, 280, (5, 48), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["K2-Thinking", "K2.5"])
def test_its_forward_is_transformers_and_folding_leaves_it(tmp_path: Path, prefix: str) -> None:
    model, values = make(tmp_path / "model", prefix, outliers=True)
    weights, skeleton = open_checkpoint(model).weights, Skeleton(open_checkpoint(model))
    found, experts = stream_logits(model, weights, TOKENS_NT, 2, skeleton)
    wanted = whole_logits(in_float32(tmp_path / "plain", model, values), TOKENS_NT)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    folded, same_experts = stream_logits(model, randomly_folded(weights, skeleton), TOKENS_NT, 2, skeleton)
    assert float((folded - found).norm() / found.norm()) < 1e-6
    assert all(torch.equal(one, other) for one, other in zip(experts, same_experts, strict=True))


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["K2-Thinking", "K2.5"])
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, prefix: str) -> None:
    model, values = make(tmp_path / "model", prefix)
    (file,) = dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN).folders.values()
    wanted = whole_logits(in_float32(tmp_path / "plain", model, values), TOKENS_NT)
    original_NTV, seen_NTV = wanted.double().log_softmax(-1), every_position(file, TOKENS_NT, in_f32=True)
    assert float((original_NTV.exp() * (original_NTV - seen_NTV)).sum(-1).max()) < 1e-5


FORMATS = ["awq", "compressed-tensors", "gguf:Q4_0"]


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A model with outliers in its norms, and beside it its outputs with nothing but scales and plain rounding."""
    folder = tmp_path_factory.mktemp("scaled")
    model, _ = make(folder / "model", outliers=True)
    options = FAST | {"steps": "scales", "preset": "compact", "calibration": [str(text_file)]}
    dsquant.awq(model, to=FORMATS, output=folder / "out", **options)
    return folder


def test_every_format_is_made_of_it_verified_whole_and_read_back(scaled: Path, text_file: Path) -> None:
    assert dsquant.verify(scaled / "out", source=scaled / "model", everything=True, progress=False).ok
    measured = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    outputs = [scaled / "out" / name.partition(":")[0] for name in FORMATS]
    for candidate in dsquant.evaluate(scaled / "model", *outputs, **measured).candidates:
        assert 0 < candidate.texts["text.txt"].mean_kl.estimate < 0.2 and not candidate.findings


@pytest.mark.parametrize("name", FORMATS)
def test_the_scales_that_a_job_has_found_change_nothing_but_by_rounding(scaled: Path, name: str) -> None:
    model, scales = scaled / "model", open_scales(scaled / "out" / name.partition(":")[0])
    weights, skeleton = open_checkpoint(model).weights, Skeleton(open_checkpoint(model))
    fold = Fold()
    for layer in skeleton.layers:
        fold.update(recorded_fold(layer, weights, scales))
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert (norm in fold) == (name != "compressed-tensors") and "model.layers.1.input_layernorm.weight" in fold
    wanted, experts = stream_logits(model, weights, TOKENS_NT, 2, skeleton)
    found, same_experts = stream_logits(model, FoldedWeights(weights, fold), TOKENS_NT, 2, skeleton)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert all(torch.equal(one, other) for one, other in zip(experts, same_experts, strict=True))


@pytest.fixture(scope="module")
def compact(kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its compressed-tensors, with all steps of the default preset."""
    output = tmp_path_factory.mktemp("compact") / "out"
    text = output.parent / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    dsquant.awq(kimi[0], calibration=[str(text)], output=output, **FAST | {"steps": None})
    return output


def packed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of routed experts."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name}


def test_compressed_tensors_takes_over_the_experts_byte_for_byte(
    kimi: tuple[Path, dict[str, torch.Tensor]], compact: Path
) -> None:
    wanted, found = packed_tensors(kimi[0]), packed_tensors(compact)
    assert len(wanted) == 4 * 3 * 3 and wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert dsquant.verify(compact, source=kimi[0], everything=True, progress=False).ok
    folded = [name for name in open_scales(compact) if "post_attention_layernorm" in name]
    assert folded == ["model.layers.0.post_attention_layernorm"]  # the dense layer's


def test_the_config_describes_both_kinds_and_transformers_loads_them(compact: Path, tmp_path: Path) -> None:
    from checkpoints import full_model
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = tmp_path / "out"
    shutil.copytree(compact, folder)
    config = json.loads((folder / "config.json").read_text())
    experts, others = config["quantization_config"]["config_groups"].values()
    assert experts["targets"] == [
        rf"re:.*layers\.(1)\.mlp\.experts\.\d+\.{one}_proj$" for one in ("down", "gate", "up")
    ]
    assert (experts["weights"]["group_size"], others["weights"]["group_size"], others["targets"]) == (
        32,
        64,
        ["Linear"],
    )
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))  # kimi_k2 is code elsewhere
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
        found = AutoModelForCausalLM.from_pretrained(folder, **options).state_dict()
    for name, values in full_model(folder, open_checkpoint(folder).weights).state_dict().items():
        assert float((found[name] - values).abs().max()) <= 2**-8 * float(values.abs().max()), name


def test_an_output_with_all_steps_is_near_the_original(
    kimi: tuple[Path, dict[str, torch.Tensor]], compact: Path
) -> None:
    options = {"texts": ["code"], "samples": 1, "seq_len": 64, "prompts": "none", "progress": False}
    (candidate,) = dsquant.evaluate(kimi[0], compact, **options).candidates
    assert candidate.format == "compressed-tensors 4 bits, groups of 32 and 64"
    assert candidate.texts["code"].mean_kl.estimate < 0.1


def test_the_next_release_is_made_under_its_scales(
    kimi: tuple[Path, dict[str, torch.Tensor]], compact: Path, tmp_path: Path
) -> None:
    changed, name = tmp_path / "new", "model.layers.1.mlp.experts.1.up_proj.weight_packed"
    shutil.copytree(kimi[0], changed)
    for shard in changed.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file(tensors | {name: tensors[name].flip(0).contiguous()}, shard)
    done = dsquant.delta(compact, changed, output=tmp_path / "out", progress=False)
    assert done.changed == [name.removesuffix("_packed")] and not done.anew
    assert torch.equal(packed_tensors(tmp_path / "out")[name], packed_tensors(changed)[name])
    assert dsquant.verify(tmp_path / "out", source=changed, progress=False).ok


def test_plan_counts_the_experts_as_they_are(kimi: tuple[Path, dict[str, torch.Tensor]]) -> None:
    planned = {one.name: one.by_kind.get("routed experts") for one in dsquant.plan(kimi[0]).sizes}
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed_tensors(kimi[0]).values())
    assert planned["source"] == planned["compressed-tensors compact"] == size
    of_config = {one.name: one.by_kind.get("routed experts") for one in dsquant.plan(kimi[0] / "config.json").sizes}
    assert of_config["source"] == of_config["compressed-tensors compact"] == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quality"}, r"has all linears of that preset in 4 bits or fewer; take --preset compact"),
        ({"symmetric": False}, "have no zero points"),
    ],
)
def test_what_would_leave_nothing_to_do_or_engines_refuse_is_refused(
    kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dsquant.awq(kimi[0], to="compressed-tensors", calibration="code", output=tmp_path / "out", **FAST | options)
    assert not (tmp_path / "out").exists()


def test_a_stated_shape_that_contradicts_the_codes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.down_proj.weight_shape"
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file(tensors | {name: torch.tensor([128, 32])}, shard)
    with pytest.raises(
        InputError, match=r"model-0000\d\.safetensors: tensor '.*2\.down_proj\.weight_shape' says \[128, 32\]"
    ):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_what_was_quantized_elsewhere_is_still_refused(tmp_path: Path, text_file: Path) -> None:
    model, _ = make(tmp_path / "model", model_type="deepseek_v3")
    with pytest.raises(InputError, match=r"already quantized \(compressed-tensors\)"):
        dsquant.awq(model, to="awq", calibration=[str(text_file)], output=tmp_path / "out", **FAST)


def test_a_tokenizer_that_is_code_is_read_from_the_file_beside_it(tmp_path: Path) -> None:
    model, _ = make(tmp_path / "model")
    path = model / "tokenizer_config.json"
    code = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization.TikTokenTokenizer", None]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (model / "tiktoken.model").write_text("")
    assert load_tokenizer(model).encode("def f(x):")
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tiktoken\.model is read by code .* put a tokenizer\.json"):
        load_tokenizer(model)
