"""Turns an FP8 DeepSeek-V3 checkpoint into one that transformers, AutoAWQ and llm-compressor can load.

    python -m benchmarks.peers.to_bf16 MODEL OUTPUT [--dtype float32]

The peers do not read 128x128 block FP8 on a CPU, and transformers' own dequantization is wrong for ragged
blocks. The MTP layer goes: no peer quantizes it. An FP8 value times its scale rarely fits BF16's 8 bits, so
`--dtype float32` gives a peer exactly the weights that the original computes with.

This file imports nothing of dsquant, and only torch and safetensors: it runs in every peer's environment.
"""

import argparse
import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCALE_SUFFIX = "_scale_inv"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_config(folder: Path) -> dict:
    """The checkpoint's config.json."""
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards, as stored.

    Raises:
        FileNotFoundError: no safetensors file in the folder.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder}: no *.safetensors file")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors.update(load_file(shard))
    return tensors


def dequantize_blocks(weight_OI: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """FP8 times its block's scale; the last block of a row or column may be ragged.

    Args:
        weight_OI: float8_e4m3fn [O, I].
        scales: [ceil(O / block rows), ceil(I / block columns)].
        block: rows and columns of a block.

    Returns:
        float32 [O, I].

    Raises:
        ValueError: the scales have another shape.
    """
    rows, columns = weight_OI.shape
    expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales of shape {tuple(scales.shape)}, expected {expected}")
    row_block = torch.arange(rows) // block[0]
    column_block = torch.arange(columns) // block[1]
    return weight_OI.float() * scales.float()[row_block][:, column_block]


def dequantized_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of an FP8 (or plain) checkpoint in float32, without the scales."""
    config = read_config(folder).get("quantization_config", {})
    block = tuple(config.get("weight_block_size", (128, 128)))
    stored = read_tensors(folder)
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            weights[name] = dequantize_blocks(tensor, stored[name + SCALE_SUFFIX], block)
        else:
            weights[name] = tensor.float()
    return weights


def is_mtp(name: str, num_hidden_layers: int) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer: they are numbered after the decoder's."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer.group(1)) >= num_hidden_layers


def convert(folder: Path, output: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint, its config without quantization and MTP, and the tokenizer's files.

    The router's bias stays float32, as in the original.
    """
    config = read_config(folder)
    weights = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in dequantized_tensors(folder).items()
        if not is_mtp(name, config["num_hidden_layers"])
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    config.pop("quantization_config", None)
    config |= {"num_nextn_predict_layers": 0, "torch_dtype": str(dtype).removeprefix("torch.")}
    (output / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, output / name)


def main() -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    convert(arguments.model, arguments.output, DTYPES[arguments.dtype])


if __name__ == "__main__":
    main()
