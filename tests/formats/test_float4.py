"""NVFP4 and MXFP4 in safetensors: golden bytes, round trips through other decoders, and whole outputs."""

import json
import warnings
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from checkpoints import QWEN3, add_tokenizer, full_model, make_dense, make_pico_r1
from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import KILLED, run
from ranks import command, finish, start
from safetensors.torch import load_file, save_file
from shapes import NARROW
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint, stored_weights
from dsquant.formats.skip_lists import FUSED
from dsquant.formats.table import SAFETENSORS
from dsquant.formats.wanted import Linears
from dsquant.incremental.release import full_run
from dsquant.schemes import QuantizedWeight, round_to_nearest
from dsquant.schemes.floats import E2M1_VALUES, Mxfp4, Nvfp4, codes_of_bits, e2m1_bits
from dsquant.source.shards import ShardIndex, read_index

pytestmark = pytest.mark.usefixtures("imported")
LINEAR = "model.layers.0.self_attn.o_proj"
FORMATS = ("nvfp4", "mxfp4", "nvfp4-modelopt")
PRESETS = {"nvfp4": ("NVFP4A16", NVFP4PackedCompressor), "mxfp4": ("MXFP4A16", MXFP4PackedCompressor)}
BITS_OF_VALUES = {value: bits for bits, value in enumerate((*E2M1_VALUES, *(-value for value in E2M1_VALUES)))}


def of_nibbles(bytes_OI: torch.Tensor, scales_OB: torch.Tensor) -> torch.Tensor:
    """What ModelOpt's decoder gives, one value after the other."""
    values = {bits: value for value, bits in BITS_OF_VALUES.items() if value} | {0: 0.0, 8: 0.0}
    rows = [[values[nibble] for byte in row for nibble in (byte % 16, byte // 16)] for row in bytes_OI.tolist()]
    return (torch.tensor(rows).unflatten(1, (scales_OB.shape[1], -1)) * scales_OB.unsqueeze(2)).flatten(1)


def test_codes_scales_and_the_tensors_scale_have_the_bytes_that_engines_read() -> None:
    codes = torch.arange(16).clamp(max=14).to(torch.uint8)
    assert e2m1_bits(codes).tolist() == [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert codes_of_bits(e2m1_bits(codes)).tolist() == codes.tolist() and codes_of_bits(torch.tensor(8)) == 7
    zeros = torch.zeros(1, 1, dtype=torch.uint8)
    weight = QuantizedWeight(codes.view(1, 16), torch.tensor([[0.75]]), zeros, Nvfp4(0.5))
    packed = SAFETENSORS["nvfp4"].pack(LINEAR, weight)
    bytes_ = [0xEF, 0xCD, 0xAB, 0x09, 0x21, 0x43, 0x65, 0x77]
    assert packed[f"{LINEAR}.weight_packed"].tolist() == [bytes_]
    assert packed[f"{LINEAR}.weight_scale"].dtype == torch.float8_e4m3fn
    assert packed[f"{LINEAR}.weight_scale"].view(torch.uint8).tolist() == [[0x3C]]  # 1.5
    assert packed[f"{LINEAR}.weight_global_scale"].tolist() == [2.0]
    packed = SAFETENSORS["nvfp4-modelopt"].pack(LINEAR, weight)
    assert packed[f"{LINEAR}.weight"].tolist() == [bytes_] and packed[f"{LINEAR}.weight_scale_2"].shape == ()
    assert packed[f"{LINEAR}.weight_scale"].view(torch.uint8).tolist() == [[0x3C]]
    assert float(packed[f"{LINEAR}.weight_scale_2"]) == 0.5
    weight = QuantizedWeight(codes.repeat(2).view(1, 32), torch.tensor([[0.25]]), zeros, Mxfp4())
    packed = SAFETENSORS["mxfp4"].pack(LINEAR, weight)
    assert packed[f"{LINEAR}.weight_packed"].tolist() == [bytes_ * 2]
    assert packed[f"{LINEAR}.weight_scale"].tolist() == [[125]]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**16), spread=st.floats(1e-6, 1e6))
def test_independent_decoders_read_exactly_what_was_rounded(
    tmp_path_factory: Any, name: str, rows: int, blocks: int, seed: int, spread: float
) -> None:
    known = SAFETENSORS[name]
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * spread
    weight[0, :16] = 0
    scheme = known.layout.scheme  # type: ignore[attr-defined]
    rounded = round_to_nearest(weight, scheme)
    packed = known.pack(LINEAR, rounded)
    short = {part.removeprefix(f"{LINEAR}."): tensor for part, tensor in packed.items()}
    if name in PRESETS:
        preset, compressor = PRESETS[name]
        found = compressor.decompress(short, preset_name_to_scheme(preset, ["Linear"]))["weight"].float()
    else:
        found = of_nibbles(short["weight"], short["weight_scale"].float() * short["weight_scale_2"])
    assert torch.equal(found, rounded.dequantize())
    planned = known.stored(LINEAR, (rows, 32 * blocks), scheme)
    assert {one.name: one.shape for one in planned} == {part: tuple(one.shape) for part, one in packed.items()}
    folder = tmp_path_factory.mktemp("floats")
    save_file(packed, folder / "model.safetensors")
    config = {"quantization_config": known.quantization_config(scheme, Linears({LINEAR: True}))}
    assert torch.equal(stored_weights(read_index(folder), config)[f"{LINEAR}.weight"], found)
    again = known.unpack(LINEAR, packed, scheme)
    assert again.grid == rounded.grid and torch.equal(again.codes_OI, rounded.codes_OI)
    assert torch.equal(again.dequantize(), found)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, a mixture layer, and a layer for multi-token prediction."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("float4") / "pico", **NARROW))


def make(model: Path, text_file: Path, output: Path, **options: Any) -> Any:
    small = {"preset": "compact", "steps": "scales", "samples": 2, "seq_len": 16, "progress": False}
    return dsquant.awq(model, output=output, calibration=text_file, **small | options)


@pytest.fixture(scope="module")
def output(pico: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in all layouts, every linear quantized, those of the layer for multi-token prediction too; read only."""
    folder = tmp_path_factory.mktemp("float4") / "out"
    made = make(pico, text_file, folder, to=FORMATS, mtp="quantize", rest="bf16")
    for name in FORMATS:
        assert all(found.mean_kl < 1 for found in made.divergence[name].values())
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "scale"), [("nvfp4", "weight_global_scale"), ("nvfp4-modelopt", "weight_scale_2")])
def test_linears_that_engines_fuse_share_the_scale_of_the_tensor(output: Path, name: str, scale: str) -> None:
    scales = {
        part.removesuffix(f".{scale}"): float(one)
        for part, one in tensors_of(output / name).items()
        if part.endswith(scale)
    }
    fused = 0
    for linear in scales:
        parent, _, part = linear.rpartition(".")
        for parts in {*FUSED.values()}:
            if part == parts[0] and all(f"{parent}.{other}" in scales for other in parts):
                assert len({scales[f"{parent}.{other}"] for other in parts}) == 1, (parent, parts)
                fused += 1
    assert fused == 3 + 1 + 2 * 5  # q_a and kv_a; gate and up of the dense MLP, of shared experts and experts
    assert len(set(scales.values())) > 1


def test_both_nvfp4_outputs_hold_the_same_weights_and_transformers_decodes_them(output: Path, pico: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    one, other = (open_checkpoint(output / name).weights for name in ("nvfp4", "nvfp4-modelopt"))
    assert set(one) == set(other) == set(open_checkpoint(pico).weights)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert isinstance(one.scheme("model.layers.2.mlp.experts.3.up_proj.weight"), Nvfp4)
    for name in PRESETS:
        weights = open_checkpoint(output / name).weights
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that the config given here wins
            model = AutoModelForCausalLM.from_pretrained(
                output / name, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
            )
        wanted, found = full_model(output / name, weights).state_dict(), model.state_dict()
        assert set(found) == set(wanted)
        other = {key for key, values in wanted.items() if not torch.equal(found[key].float(), values)}
        # of NVFP4's experts it forgets the scale of the tensor
        assert other == {key for key in wanted if ".experts." in key and name == "nvfp4"}
        card = (output / name / "README.md").read_text()
        assert ("library_name: transformers" in card) == (name == "mxfp4")


@pytest.mark.parametrize("name", FORMATS)
def test_configs_say_what_engines_look_for(output: Path, name: str) -> None:
    config = json.loads((output / name / "config.json").read_text())["quantization_config"]
    index = read_index(output / name)
    assert index["model.layers.1.self_attn.kv_b_proj.weight"].dtype == "BF16"
    if name not in PRESETS:
        assert (config["quant_method"], config["quant_algo"], config["group_size"]) == ("modelopt", "W4A16_NVFP4", 16)
        assert {"lm_head", "kv_b_proj", "model.layers.1.mlp.gate"} <= set(config["ignore"]) | {
            "model.layers.1.mlp.gate"
        }
        return
    parsed = QuantizationConfig.model_validate(config)
    (group,) = parsed.config_groups.values()
    theirs = preset_name_to_scheme(PRESETS[name][0], ["Linear"]).weights
    for part in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "scale_dtype", "zp_dtype"):
        assert getattr(group.weights, part) == getattr(theirs, part), part
    assert parsed.format == group.format == f"{name}-pack-quantized" and group.targets == ["Linear"]
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.1.self_attn.kv_b_proj"} <= set(parsed.ignore)


def test_outputs_are_verified_evaluated_and_planned_like_any_other(pico: Path, output: Path) -> None:
    assert dsquant.verify(output, everything=True, progress=False).ok
    original = open_original(str(pico))
    words = [open_candidate(str(output / name), original).format for name in FORMATS]
    assert words == ["NVFP4, blocks of 16", "MXFP4, blocks of 32", "NVFP4 (ModelOpt), blocks of 16"]
    assert "groups of 16" in (output / "nvfp4" / "README.md").read_text()
    sizes = {size.format: size for size in dsquant.plan("tiny-r1").sizes if size.preset == "compact"}
    assert set(FORMATS) < sizes.keys() and {sizes[name].bits for name in FORMATS} == {4}


def test_a_delta_rounds_changed_experts_in_the_recorded_scales(pico: Path, text_file: Path, tmp_path: Path) -> None:
    make(pico, text_file, tmp_path / "out", to="nvfp4", preset="quality", steps="none", evaluate=False)
    changed_copy(pico, tmp_path / "new", noise(0.1, seed=3))
    made = dsquant.delta(tmp_path / "out", tmp_path / "new", output=tmp_path / "delta", progress=False)
    assert any(".experts." in name for name in made.changed)
    full_run(str(tmp_path / "new"), tmp_path / "out", tmp_path / "full")
    assert contents(tmp_path / "delta") == contents(tmp_path / "full")
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok


def test_experts_are_named_where_the_rest_keeps_its_fp8_blocks(pico: Path, text_file: Path, tmp_path: Path) -> None:
    made = make(pico, text_file, tmp_path / "out", to="nvfp4", preset="quality")
    assert all(found.mean_kl < 1 for found in made.divergence["nvfp4"].values())
    index: ShardIndex = read_index(tmp_path / "out")
    assert index["model.layers.1.self_attn.o_proj.weight"].dtype == "F8_E4M3"
    assert index["model.layers.1.mlp.experts.0.up_proj.weight_packed"].dtype == "U8"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    first, second = QuantizationConfig.model_validate(config).config_groups.values()
    assert (first.format, second.format, second.targets) == ("nvfp4-pack-quantized", "float-quantized", ["Linear"])
    assert all("experts" in target for target in first.targets)
    found = open_candidate(str(tmp_path / "out"), open_original(str(pico))).format
    assert found == "NVFP4, blocks of 16, the rest in FP8 blocks"


def test_linears_without_whole_blocks_stay_as_they_are(text_file: Path, tmp_path: Path) -> None:
    odd = QWEN3 | {"num_hidden_layers": 1, "intermediate_size": 136}
    dense = add_tokenizer(make_dense(tmp_path / "qwen3", odd))
    made = make(dense, text_file, tmp_path / "out", to="nvfp4", steps="none")
    assert any("3 linears stay unquantized" in warning for warning in made.warnings)
    index = read_index(tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.weight" in index and "model.layers.0.self_attn.q_proj.weight_packed" in index


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "nvfp4", "bits": 8}, "4-bit floats only, not 8 bits"),
        ({"to": "mxfp4", "symmetric": False}, "no zero points"),
        ({"to": "nvfp4", "group_size": 32}, "blocks of 16"),
        ({"to": "nvfp4-modelopt", "rest": "fp8"}, "holds no FP8 blocks"),
        ({"to": "nvfp4", "activations": "fp8"}, "nvfp4 has no inputs of that kind; take --to compressed-tensors"),
    ],
)
def test_what_floats_do_not_take_is_refused(
    pico: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make(pico, text_file, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("name", "change", "tensors"),
    [
        ("nvfp4", {"format": "mxfp4-pack-quantized"}, {}),
        ("nvfp4", {"targets": None}, {}),
        ("nvfp4", {}, {"weight_scale": torch.zeros(2, 3).to(torch.float8_e4m3fn)}),
        ("nvfp4", {}, {"weight_packed": torch.zeros(2, 32, dtype=torch.int32)}),
        ("nvfp4", {}, {"weight_global_scale": torch.zeros(2)}),
        ("nvfp4-modelopt", {}, {"weight_scale": torch.zeros(2, 4)}),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_by_name(
    name: str, change: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    known, scheme = SAFETENSORS[name], Nvfp4()
    packed = known.pack(LINEAR, round_to_nearest(torch.randn(2, 64), scheme))
    save_file({**packed, **{f"{LINEAR}.{part}": one for part, one in tensors.items()}}, tmp_path / "model.safetensors")
    config = known.quantization_config(scheme, Linears({LINEAR: True}))
    for group in config["config_groups"].values():
        group |= change
    with pytest.raises(InputError, match=r"config\.json|tensor '"):
        stored_weights(read_index(tmp_path), {"quantization_config": config})


def test_modelopts_blocks_have_sixteen_weights(tmp_path: Path) -> None:
    known = SAFETENSORS["nvfp4-modelopt"]
    save_file(known.pack(LINEAR, round_to_nearest(torch.randn(2, 64), Nvfp4())), tmp_path / "model.safetensors")
    config = known.quantization_config(Nvfp4(), Linears({LINEAR: True}))
    with pytest.raises(InputError, match=r"config\.json: quantization_config has group_size 32; expected one of 16"):
        stored_weights(read_index(tmp_path), {"quantization_config": config | {"group_size": 32}})


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["compact", "best"])
def test_two_ranks_write_the_bytes_of_one(narrow_r1: Path, text_file: Path, tmp_path: Path, preset: str) -> None:
    formats = ("--to", "nvfp4", "--to", "mxfp4", "--rest", "bf16")
    more = (*formats, "--preset", preset, "--mtp", "quantize", "--samples", "3")
    forked.finish(*command(narrow_r1, text_file, tmp_path / "one", *more))
    finish(start(2, narrow_r1, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_target_leaves_the_most_sensitive_linears_unquantized(text_file: Path, tmp_path: Path) -> None:
    dense = add_tokenizer(make_dense(tmp_path / "qwen3", QWEN3 | {"num_hidden_layers": 1}))
    make(dense, text_file, tmp_path / "out", to="nvfp4-modelopt", steps="none", target_bits=9, evaluate=False)
    index = read_index(tmp_path / "out")
    packed = {name.removesuffix(".weight_scale") for name in index if name.endswith(".weight_scale")}
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    kept = {name.removesuffix(".weight") for name in index if name.endswith("_proj.weight")} - packed
    assert packed and kept and all(any(entry in name for entry in ignored) for name in kept)
    assert not any(entry in name for entry in ignored for name in packed)
    assert dsquant.verify(tmp_path / "out", everything=True, progress=False).ok


@pytest.mark.slow
def test_a_killed_job_continues_with_the_same_bytes(pico: Path, text_file: Path, tmp_path: Path) -> None:
    def job(folder: Path, resume: bool = False) -> None:
        options = {"to": ("nvfp4", "nvfp4-modelopt"), "rest": "bf16", "steps": "clip", "evaluate": False}
        make(pico, text_file, folder / "out", resume=resume, **options)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    code, calls = run(lambda: job(tmp_path / "whole"), tmp_path / "whole", None)
    assert code == 0
    code, _ = run(lambda: job(tmp_path / "killed"), tmp_path / "killed", 2 * calls // 3)
    assert code == KILLED
    assert run(lambda: job(tmp_path / "killed", resume=True), tmp_path / "killed", None)[0] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
