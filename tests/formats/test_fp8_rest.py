"""compressed-tensors with what is not quantized in the release's own FP8 blocks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import add_tokenizer, full_model, make_pico_r1
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shapes import NARROW
from small_jobs import FAST

import dsquant
from benchmarks.peers.decoding import decode_compressed_tensors
from dsquant.errors import InputError, UsageError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.scales import open_scales
from dsquant.kernels.fp8 import dequantize_fp8, requantize_fp8
from dsquant.model.structure import ScaleGroup
from dsquant.pipeline.card import model_card
from dsquant.quantization.scale import group_candidates
from dsquant.source.checkpoint import FP8
from dsquant.source.shards import ShardIndex

BLOCK = (16, 16)
LAYER = "model.layers.1"


def in_blocks(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as a release has them: 448 is each block's largest code."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    return requantize_fp8(weight, ones / 448 * 3, BLOCK)


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return dequantize_fp8(codes, scales, BLOCK)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**16), reach=st.integers(0, 4))
def test_a_weight_times_powers_of_two_keeps_its_mantissas(rows: int, columns: int, seed: int, reach: int) -> None:
    codes, scales = in_blocks(rows, columns, seed)
    draw = torch.Generator().manual_seed(seed)
    factors = [torch.randint(-reach, reach + 1, (size,), generator=draw).float().exp2() for size in (rows, columns)]
    changed = decoded(codes, scales) * factors[0].unsqueeze(1) * factors[1]
    found = decoded(*requantize_fp8(changed, scales, BLOCK))
    largest = changed.abs().max()
    exact = (found == changed) | (changed.abs() < largest * 2.0**-13)
    assert bool(exact.all())
    assert float((found - changed).abs().max()) <= float(largest) * 2.0**-17


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_an_unchanged_weight_keeps_every_byte(seed: int) -> None:
    codes, scales = in_blocks(24, 40, seed)
    again = requantize_fp8(decoded(codes, scales), scales, BLOCK)
    once_more = requantize_fp8(decoded(*again), again[1], BLOCK)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(again, once_more, strict=True))
    assert torch.equal(decoded(*again), decoded(codes, scales))


def test_blocks_of_zeros_and_scales_of_zero_stay_zeros() -> None:
    scales = torch.tensor([[1.0, 0.0]])
    codes, rescaled = requantize_fp8(torch.zeros(3, 20), scales, BLOCK)
    assert not codes.float().any() and bool(rescaled.isfinite().all()) and bool((rescaled > 0).all())


def make(model: Path, text_file: Path, output: Path, **options: Any) -> Any:
    return dsquant.awq(model, output=output, calibration=text_file, **FAST | {"steps": "scales", **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 model with outlier channels, whose scales are worth folding."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("outliers") / "model", outliers=True, **NARROW))


@pytest.fixture(scope="module")
def quality(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it becomes where no format is named."""
    return Path(make(model, text_file, tmp_path_factory.mktemp("fp8") / "out").output)


def index_of(folder: Path) -> ShardIndex:
    return open_checkpoint(folder).index


def test_an_fp8_model_becomes_compressed_tensors_with_its_own_blocks(quality: Path, model: Path) -> None:
    record = json.loads((quality / "dsquant.json").read_text())
    assert record["recipe"]["to"] == ["compressed-tensors"] and record["recipe"]["rest"] == "fp8"
    source, found = index_of(model), index_of(quality)
    kept = [name for name, info in source.items() if info.dtype == FP8 and name in found]
    assert f"{LAYER}.self_attn.kv_b_proj.weight" in kept and "model.layers.2.mlp.experts.0.up_proj.weight" in kept
    folded = {f"{LAYER}.mlp.shared_experts.{part}.weight" for part in ("gate_proj", "up_proj")}
    assert folded < set(kept)
    for name in kept:
        scales = (source.read(f"{name}_scale_inv"), found.read(f"{name}_scale"))
        if name not in folded:
            assert torch.equal(source.read(name).view(torch.uint8), found.read(name).view(torch.uint8)), name
            assert torch.equal(*scales), name
    assert not [name for name in found if name.endswith("_scale_inv")]
    assert found.num_bytes < source.num_bytes
    assert "FP8 in its own blocks" in (quality / "README.md").read_text()
    record["recipe"]["model"] = "deepseek-ai/DeepSeek-R1"
    head = yaml.safe_load(model_card(record, "compressed-tensors").split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == (record["recipe"]["model"], "quantized")
    assert (head["pipeline_tag"], head["library_name"]) == ("text-generation", "transformers")


def test_what_scales_are_folded_into_has_no_error_beyond_the_releases(quality: Path, model: Path) -> None:
    scales_H = open_scales(quality).read(f"{LAYER}.post_attention_layernorm")
    assert torch.equal(scales_H.log2(), scales_H.log2().round()) and len(scales_H.unique()) > 1
    source, found = open_checkpoint(model).weights, open_checkpoint(quality).weights
    for part in ("gate_proj", "up_proj"):
        name = f"{LAYER}.mlp.shared_experts.{part}.weight"
        wanted = source[name] * scales_H
        assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-6


def test_the_config_is_compressed_tensors_own(quality: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    stored = json.loads((quality / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    four, fp8 = config.config_groups.values()
    assert (four.format, fp8.format, stored["format"]) == ("pack-quantized", "float-quantized", "pack-quantized")
    assert four.targets == [rf"re:.*layers\.(1)\.mlp\.experts\.\d+\.{part}_proj$" for part in ("down", "gate", "up")]
    assert fp8.targets == ["Linear"] and fp8.weights.strategy == "block"
    assert fp8.weights.block_structure == [128, 128] and fp8.input_activations.group_size == 128
    assert fp8.input_activations.dynamic and four.input_activations is None
    routers = [f"model.layers.{layer}.mlp.gate" for layer in (1, 2)]
    assert config.ignore == ["lm_head", *routers, "re:.*eh_proj$", r"re:.*shared_head\.head$", "re:.*embed_tokens$"]


def test_compressed_tensors_own_matching_decodes_what_dsquant_reads(quality: Path) -> None:
    stored = {name: tensor for path in quality.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((quality / "config.json").read_text())["quantization_config"]
    theirs, ours = decode_compressed_tensors(stored, config), open_checkpoint(quality).weights
    assert set(theirs) == set(ours)
    assert all(torch.equal(ours[name], values) for name, values in theirs.items())


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_it_with_the_weights_that_dsquant_reads(quality: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    options = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(quality, **options)
    wanted, found = full_model(quality, open_checkpoint(quality).weights).state_dict(), model.state_dict()
    for name, values in wanted.items():  # some are rounded to bfloat16
        assert float((found[name] - values).abs().max()) <= 2**-8 * float(values.abs().max()), name


@pytest.mark.slow
def test_scales_of_attention_are_powers_of_two_where_they_reach_blocks(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    to = ["awq", "compressed-tensors"]
    made = make(model, text_file, tmp_path / "out", to=to, preset="compact", symmetric=True, evaluate=True)
    found = {name: open_scales(folder) for name, folder in made.folders.items()}
    producer = f"{LAYER}.self_attn.kv_b_proj"
    scales = [found["compressed-tensors"].read(name) for name in found["compressed-tensors"] if "kv_b" in name]
    assert scales and all(torch.equal(scales_I.log2(), scales_I.log2().round()) for scales_I in scales)
    opened = open_checkpoint(made.folders["compressed-tensors"])
    assert opened.index[f"{producer}.weight"].dtype == FP8
    assert index_of(made.folders["awq"])[f"{producer}.weight"].dtype == "BF16"
    divergence = {name: texts["code"].mean_kl for name, texts in made.divergence.items()}
    assert divergence["compressed-tensors"] < 1.5 * divergence["awq"] + 1e-4
    assert not dsquant.verify(tmp_path / "out", everything=True, progress=False).findings


def test_only_powers_of_two_are_tried_for_what_is_folded_into_blocks() -> None:
    group = ScaleGroup("kv_b_proj", ("o_proj",))
    generator = torch.Generator().manual_seed(0)
    reads = tuple(torch.rand(8, generator=generator) + 0.1 for _ in range(2))
    tried = group_candidates(group, torch.ones(8, 4), *reads, exact=True)
    assert torch.equal(tried.log2(), tried.log2().round()) and len(tried.unique(dim=0)) > 2
    other = group_candidates(group, torch.ones(8, 4), *reads)
    assert not torch.equal(other.log2(), other.log2().round())


def test_bf16_is_kept_where_it_is_asked_for(narrow_r1: Path, text_file: Path, tmp_path: Path) -> None:
    made = make(narrow_r1, text_file, tmp_path / "out", to="compressed-tensors", rest="bf16", steps="none")
    assert {info.dtype for info in index_of(made.output).values()} == {"BF16", "F32", "I32", "I64"}
    config = json.loads((made.output / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_a_target_chooses_between_four_bits_and_the_releases_eight(
    narrow_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    made = make(
        narrow_r1, text_file, tmp_path / "out", to="compressed-tensors", preset="compact", target_bits=6.0, steps="none"
    )
    assert {entry["width"] for entry in made.precision.values()} == {4, "FP8"}
    assert "FP8" in str(made) and not dsquant.verify(made.output, everything=True, progress=False).findings
    described = dsquant.evaluate(
        narrow_r1, made.output, texts=["code"], samples=1, seq_len=32, prompts="none", progress=False
    )
    assert described.candidates[0].format.endswith("the rest in FP8 blocks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "awq", "rest": "fp8"}, "awq holds no FP8 blocks; add --to compressed-tensors"),
        ({"to": "compressed-tensors", "rest": "fp8", "model": "dense"}, "the model has no FP8 blocks"),
    ],
)
def test_blocks_that_cannot_be_kept_are_refused(
    narrow_r1: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = narrow_r1
    if options.pop("model", None):
        model = tmp_path / "dense"
        model.mkdir()
        config = json.loads((narrow_r1 / "config.json").read_text())
        del config["quantization_config"]
        (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        make(model, text_file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("scale", r"no 'model\.layers\.0\.self_attn\.o_proj\.weight_scale'"),
        ("group", "no config group 'float-quantized'"),
        ("strategy", "only FP8 blocks of one size"),
    ],
)
def test_a_reader_tells_what_is_wrong_with_blocks(quality: Path, tmp_path: Path, damage: str, message: str) -> None:
    folder = Path(shutil.copytree(quality, tmp_path / "copy"))
    config = json.loads((quality / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    if damage == "group":
        del groups["group_1"]
    elif damage == "strategy":
        groups["group_1"]["weights"]["strategy"] = "channel"
    else:
        name = "model.layers.0.self_attn.o_proj.weight_scale"
        file = index_of(quality)[name].path.name
        tensors = {key: value for key, value in load_file(quality / file).items() if key != name}
        save_file(tensors, folder / file)
        listed = json.loads((quality / "model.safetensors.index.json").read_text())
        del listed["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)
