"""MLX's affine layout: golden bytes, round trips through independent decoders, and whole outputs in stacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from checkpoints import QWEN3, add_tokenizer, make_dense, make_pico_r1
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import command, finish, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import SMALLEST
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint, stored_weights
from dsquant.formats.table import FORMATS
from dsquant.formats.wanted import Linears
from dsquant.incremental.release import full_run
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest
from dsquant.source.shards import read_index

pytestmark = pytest.mark.usefixtures("imported")
LINEAR = "model.layers.0.self_attn.o_proj"
CONFIG = {"group_size": 64, "bits": 4, "mode": "affine"}
MLX = FORMATS["mlx"]


def decoded(words: np.ndarray[Any, Any], scales: torch.Tensor, biases: torch.Tensor, bits: int) -> torch.Tensor:
    """What mlx's own `dequantize` gives, one code after the other: `bits` bits each from the lowest on."""
    rows = []
    for words_of_row in words:
        stream = int.from_bytes(words_of_row.astype("<u4").tobytes(), "little")
        rows.append([stream >> place & (1 << bits) - 1 for place in range(0, 32 * len(words_of_row), bits)])
    codes = torch.tensor(rows, dtype=torch.float32).unflatten(1, (scales.shape[1], -1))
    return (codes * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(1)


def test_words_scales_and_biases_have_the_bytes_that_mlx_reads() -> None:
    grid = Grid(4, 32, True)
    codes = (torch.arange(64) % 16).view(2, 32).to(torch.uint8)
    middle = torch.full((2, 1), 8, dtype=torch.uint8)
    packed = MLX.pack(LINEAR, QuantizedWeight(codes, torch.tensor([[0.5], [0.25]]), middle, grid))
    words = packed[f"{LINEAR}.weight"]
    assert words.dtype == torch.uint32 and words.tolist() == [[0x76543210, 0xFEDCBA98] * 2] * 2
    assert packed[f"{LINEAR}.scales"].dtype == packed[f"{LINEAR}.biases"].dtype == torch.bfloat16
    assert packed[f"{LINEAR}.scales"].tolist() == [[0.5], [0.25]]
    assert packed[f"{LINEAR}.biases"].tolist() == [[-4.0], [-2.0]]


@pytest.mark.parametrize("bits", MLX.bits)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 2**16), spread=st.floats(1e-3, 1e3))
def test_independent_decoders_read_exactly_what_was_rounded(
    tmp_path_factory: Any, bits: int, rows: int, groups: int, seed: int, spread: float
) -> None:
    grid = Grid(bits, 32, True)
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * spread
    rounded = round_to_nearest(weight, grid)
    packed = MLX.pack(LINEAR, rounded)
    words, scales, biases = packed.values()
    assert torch.equal(decoded(words.numpy(), scales, biases, bits), rounded.dequantize())
    folder = tmp_path_factory.mktemp("mlx")
    save_file(packed, folder / "model.safetensors")
    config = {"quantization_config": MLX.quantization_config(grid, Linears({LINEAR: True}))}
    assert torch.equal(stored_weights(read_index(folder), config)[f"{LINEAR}.weight"], rounded.dequantize())
    again = MLX.unpack(LINEAR, packed, grid)
    assert torch.equal(again.codes_OI, rounded.codes_OI) and torch.equal(again.dequantize(), rounded.dequantize())


def test_mlx_itself_reads_the_same_values() -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    for bits in MLX.bits:
        rounded = round_to_nearest(torch.randn(64, 128), Grid(bits, 64, True))
        words, scales, biases = MLX.pack(LINEAR, rounded).values()
        parts = (mx.array(values.float().numpy()) for values in (scales, biases))
        found = mx.dequantize(mx.array(words.numpy()), *parts, group_size=64, bits=bits)
        assert torch.equal(torch.from_numpy(np.array(found)), rounded.dequantize())


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer, a mixture layer, and a layer for multi-token prediction."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("mlx") / "pico", **SMALLEST))


@pytest.fixture(scope="module")
def output(pico: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in MLX's layout, every linear quantized; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("mlx") / "out"
    made = dsquant.awq(
        pico, output=folder, to="mlx", preset="compact", steps="scales", group_size=64, samples=2, seq_len=16,
        calibration=text_file, progress=False,
    )  # fmt: skip
    assert any("multi-token-prediction layer is dropped" in warning for warning in made.warnings)
    assert all(found.mean_kl < 1 for found in made.divergence["mlx"].values())
    return folder


def test_experts_lie_in_stacks_and_the_rest_as_mlx_lm_loads_it(pico: Path, output: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in output.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "mlx"}
        tensors |= load_file(file)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == CONFIG
    assert config["num_nextn_predict_layers"] == 0 and not any("layers.2." in name for name in tensors)
    moe = "model.layers.1.mlp"
    assert tensors[f"{moe}.switch_mlp.down_proj.weight"].shape == (4, 256, 192 * 4 // 32)
    assert tensors[f"{moe}.switch_mlp.down_proj.scales"].shape == (4, 256, 3)
    assert tensors[f"{moe}.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["model.layers.1.self_attn.kv_b_proj.weight"].dtype == torch.bfloat16
    weights = open_checkpoint(output).weights
    assert set(weights) == {name for name in open_checkpoint(pico).weights if not name.startswith("model.layers.2.")}
    for expert in (0, 3):
        parts = [tensors[f"{moe}.switch_mlp.up_proj.{part}"][expert] for part in ("weight", "scales", "biases")]
        found = decoded(parts[0].numpy(), parts[1], parts[2], 4)
        assert torch.equal(weights[f"{moe}.experts.{expert}.up_proj.weight"], found)
    card = (output / "README.md").read_text()
    assert "library_name: mlx" in card and "mlx_lm" in card


def test_an_output_is_verified_evaluated_and_planned_like_any_other(pico: Path, output: Path) -> None:
    assert dsquant.verify(output, everything=True, progress=False).ok
    assert open_candidate(str(output), open_original(str(pico))).format == "MLX 4 bits, groups of 64"
    sizes = [size for size in dsquant.plan("tiny-r1").sizes if size.format == "mlx"]
    assert all("routed experts" in size.by_kind for size in sizes)
    assert {size.mtp for size in sizes} == {"drop"} and {size.bits for size in sizes} == set(MLX.bits)


def test_a_delta_writes_the_changed_experts_into_their_stacks(pico: Path, output: Path, tmp_path: Path) -> None:
    changed_copy(pico, tmp_path / "new", noise(0.1, seed=3))
    made = dsquant.delta(output, tmp_path / "new", output=tmp_path / "delta", progress=False)
    assert any(".experts." in name for name in made.changed)
    full_run(str(tmp_path / "new"), output, tmp_path / "full")
    assert contents(tmp_path / "delta") == contents(tmp_path / "full")
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok


def test_what_mlx_lm_asks_of_glm5_is_written_and_layers_without_an_indexer_are_refused() -> None:
    config = {"model_type": "glm_moe_dsa", "rope_theta": 1e6, "indexer_types": ["full", "full"]}
    written = MLX.engines_config(config)
    assert written["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"} and written["moe_layer_freq"] == 1
    with pytest.raises(UsageError, match=r"glm_moe_dsa has an indexer in every layer"):
        MLX.engines_config(config | {"indexer_types": ["full", "shared"]})


@pytest.mark.slow
def test_two_ranks_write_the_stacks_of_one_beside_a_format_that_quantizes_more(
    narrow_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    formats = ("--to", "mlx", "--to", "compressed-tensors", "--mtp", "drop")
    more = (*formats, "--preset", "compact", "--steps", "none", "--kv-b", "quantize", "--samples", "3")
    forked.finish(*command(narrow_r1, text_file, tmp_path / "one", *more))
    finish(start(2, narrow_r1, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    keys_and_values = "model.layers.1.self_attn.kv_b_proj.weight"
    assert keys_and_values in read_index(tmp_path / "one" / "mlx")
    assert f"{keys_and_values}_packed" in read_index(tmp_path / "one" / "compressed-tensors")


def test_chosen_widths_stand_under_the_names_of_modules(text_file: Path, tmp_path: Path) -> None:
    dense = add_tokenizer(make_dense(tmp_path / "qwen3", QWEN3 | {"num_hidden_layers": 1}))
    dsquant.awq(
        dense, output=tmp_path / "out", to="mlx", target_bits=6, group_size=64, steps="none", samples=2,
        seq_len=16,
        calibration=text_file, evaluate=False, progress=False,
    )  # fmt: skip
    words = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    index = read_index(tmp_path / "out")
    packed = {name.removesuffix(".scales") for name in index if name.endswith(".scales")}
    assert packed and packed == {name for name, entry in words.items() if isinstance(entry, dict)}
    assert dsquant.verify(tmp_path / "out", everything=True, progress=False).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "mlx", "symmetric": False}, "symmetric grids alone"),
        ({"to": "mlx", "bits": 7}, "no weights of 7 bits"),
        ({"to": ["awq", "mlx"]}, "--mtp drop"),
    ],
)
def test_what_mlx_does_not_take_is_refused(
    pico: Path, text_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dsquant.awq(
            pico, output=tmp_path / "out", preset="compact", group_size=64, calibration=text_file, progress=False,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (CONFIG | {"mode": "mxfp4"}, {}),
        (CONFIG | {"group_size": "x"}, {}),
        (CONFIG | {"bits": 7}, {}),
        (CONFIG | {LINEAR: False}, {}),
        (CONFIG, {f"{LINEAR}.biases": torch.zeros(2, 3, dtype=torch.bfloat16)}),
        (CONFIG, {f"{LINEAR}.weight": torch.zeros(2, 9, dtype=torch.uint32)}),
        (CONFIG, {"model.layers.0.mlp.switch_mlp.up_proj.weight": torch.zeros(2, dtype=torch.uint32)}),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    packed = MLX.pack(LINEAR, round_to_nearest(torch.randn(2, 64), Grid(4, 64, True)))
    save_file({**packed, **tensors}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json|tensor '"):
        stored_weights(read_index(tmp_path), {"quantization_config": config})


@pytest.mark.parametrize("change", [{"group_size": 32}, None])
def test_what_mlx_lm_reads_has_to_say_what_other_engines_read(output: Path, change: Any, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(output, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = change and config["quantization"] | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: engines read 'quantization', which is not"):
        open_checkpoint(folder)
