"""Damages of a small R1's checkpoint, and a small job on it."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dsquant.cli import main

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the shard that holds a tensor."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    (folder / "model-00002.safetensors").unlink(missing_ok=True)


def truncate_shard(folder: Path) -> None:
    path = folder / "model-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_scale(folder: Path) -> None:
    name = f"{EXPERT}_scale_inv"
    edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


def put_nan_into_fp8(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT].view(torch.uint8)[3, 7] = 0x7F

    edit_tensors(folder, EXPERT, change)


def put_infinity_into_bf16(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"][1, 2] = torch.inf

    edit_tensors(folder, "model.layers.1.mlp.gate.weight", change)


def put_nan_into_a_scale(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"][0, 0] = torch.nan

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def misshape_scale(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"] = torch.ones(1, 2)

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def name_an_absent_tensor(folder: Path) -> None:
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": "model-00001.safetensors"})
    )


def leave_the_folder(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "../elsewhere.safetensors"}))


def absolute_path(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "/etc/elsewhere.safetensors"}))


def contradict_the_tensors(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=128))


def one_layer_less(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=1))


def one_layer_more(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=["DeepseekV4ForCausalLM"]))


def sparse_attention(folder: Path) -> None:
    changes = {"index_topk": 2048, "index_n_heads": 64, "architectures": ["DeepseekV32ForCausalLM"]}
    edit_json(folder / "config.json", lambda config: config.update(changes))


def token_without_a_row(folder: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": '"""'})

    edit_json(folder / "tokenizer.json", change)


def no_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("model_type"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_header(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def header_that_is_no_json(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(struct.pack("<Q", 16) + b"x" * 16 + path.read_bytes()[24:])


def config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def scales_of_integers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"] = tensors[f"{EXPERT}_scale_inv"].to(torch.int32)

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def weight_of_integers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(torch.int8)

    edit_tensors(folder, EXPERT, change)


def overlapping_tensors(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [0, end - begin]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def architecture_that_is_no_name(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=[["x"]]))


def impossible_routing(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_experts_per_tok=7))


def a_thousand_million_layers(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=10**9))


def a_size_that_is_no_number(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(hidden_size="wide"))


def no_block_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def change_fp8(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(changes)
    )


def set_scale(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"][0, 0] = value

    return lambda folder: edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def edit_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes the text of a shard's header."""

    def damage(folder: Path) -> None:
        path = folder / "model-00001.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        changed = change(raw[8 : 8 + length].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])

    return damage


def extent(text: str) -> Callable[[Path], None]:
    """Puts something else in the place of the first extent of the first shape."""
    return edit_header(lambda header: re.sub(r'("shape":\s*\[)\d+', rf"\g<1>{text}", header, count=1))


def empty_shard(folder: Path) -> None:
    (folder / "model-00001.safetensors").write_bytes(b"")


def a_name_of_300_letters(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "x" * 300 + ".safetensors"}))


def run(model: Path, text: Path, output: Path, *more: str) -> tuple[int, str]:
    options = [*more, "--samples", "2", "--seq-len", "16", "--group-size", "64", "--no-evaluate", "--json"]
    arguments = ["awq", str(model), "--calibration", str(text), "--output", str(output), *options]
    result = CliRunner().invoke(main, arguments)
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
