"""FP8 checkpoints of compressed-tensors and ModelOpt are read like DeepSeek's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from checkpoints import add_tokenizer, random_weights, save_checkpoint, stored
from random_models import shapes_of
from small_jobs import FAST

import dsquant
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint

CONFIG = ARCHITECTURES["Qwen3 MoE"].config
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
LARGEST = 448.0


def grouped(**scheme: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | scheme}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def rounded(weight_OI: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales as they are stored, and the values that they stand for."""
    blocks = {"channel": (1, weight_OI.shape[1]), "tensor": weight_OI.shape, "block": (64, 64)}[strategy]
    tiles = weight_OI.unflatten(1, (-1, blocks[1])).unflatten(0, (-1, blocks[0]))
    scales = tiles.abs().amax((1, 3), keepdim=True) / LARGEST
    codes = (tiles / scales).to(torch.float8_e4m3fn)
    values = (codes.float() * scales).reshape(weight_OI.shape)
    scales = scales[:, 0, :, 0]
    return codes.reshape(weight_OI.shape), scales.reshape(()) if strategy == "tensor" else scales, values


def make(folder: Path, strategy: str, quantization: dict[str, Any] | None) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint and the values of its quantized linears."""
    tensors, values = stored(random_weights(shapes_of(CONFIG)), fp8=False), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale"], values[name] = rounded(tensors[name].float(), strategy)
        tensors[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    return save_checkpoint(folder, config, tensors), values


@pytest.mark.parametrize(
    ("strategy", "quantization"),
    [
        ("channel", grouped(strategy="channel")),
        ("tensor", grouped(strategy="tensor")),
        ("block", grouped(strategy="block", block_structure=[64, 64])),
        ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("channel", {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
    ],
    ids=["channel", "tensor", "block", "ModelOpt", "ModelOpt by channel"],
)
def test_weights_are_codes_times_scales(tmp_path: Path, strategy: str, quantization: dict[str, Any]) -> None:
    folder, values = make(tmp_path / "model", strategy, quantization)
    checkpoint = open_checkpoint(folder)
    assert all(torch.equal(checkpoint.weights[name], wanted) for name, wanted in values.items())
    name, wanted = next(iter(values.items()))
    assert torch.equal(checkpoint.weights.rows(name, 3, 70), wanted[3:70])
    assert not [name for name in checkpoint.weights if name.endswith("scale")]
    assert any("scales of activations are left out" in note for note in checkpoint.notes)


def test_a_job_reads_them_and_verify_finds_its_source(tmp_path: Path, text_file: Path) -> None:
    folder, _ = make(tmp_path / "model", "channel", grouped(strategy="channel"))
    model, output = add_tokenizer(folder, vocabulary=280), tmp_path / "out"
    dsquant.awq(model, to="compressed-tensors", calibration=[str(text_file)], output=output, **FAST)
    assert dsquant.verify(output, source=model, progress=False).ok


def test_modelopts_own_file_stands_for_a_config_without_quantization(tmp_path: Path) -> None:
    folder, values = make(tmp_path / "model", "tensor", None)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    name, wanted = next(iter(values.items()))
    assert torch.equal(open_checkpoint(folder).weights[name], wanted)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (grouped(strategy="channel", num_bits=4), "float-quantized weights of schemes"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ' is not read"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [64, 64]}, "fmt 'e5m2'"),
    ],
)
def test_other_schemes_are_refused_by_name(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    folder, _ = make(tmp_path / "model", "channel", quantization)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["F8_E5M2", "F8_E4M3FNUZ"])
def test_other_kinds_of_fp8_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    folder, _ = make(tmp_path / "model", "channel", grouped(strategy="channel"))
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = raw[8:end].replace(b'"F8_E4M3"', f'"{kind}"'.encode())
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    with pytest.raises(InputError, match=kind):
        open_checkpoint(folder)
