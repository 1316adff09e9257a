"""Brings FP8 checkpoints of compressed-tensors and ModelOpt to DeepSeek's names and words.

All of them store float8_e4m3fn with scales that multiply, for blocks, for rows (channels) or for a whole matrix; the
last two are blocks that reach as far as a matrix does. (Layouts: compressed-tensors 0.20, `float-quantized`; NVIDIA
ModelOpt's `hf_quant_config.json`.)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.strict_json import read_json_object
from dsquant.source.checkpoint import CONFIG_FILE, FP8
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.shards import ShardIndex, TensorInfo

MODELOPT_FILE = "hf_quant_config.json"
# Rows or columns of a block that ends where the matrix does.
WHOLE = 2**30
BLOCKS = {"channel": [1, WHOLE], "tensor": [WHOLE, WHOLE]}
MODELOPT_STRATEGIES = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel", "FP8_PB_WO": "block"}
MODELOPT_BLOCK = [128, 128]
# What is decoded from its own layout (`formats.float4`).
MODELOPT_FLOAT4 = ("NVFP4", "W4A16_NVFP4")
_SCALE = ".weight_scale"
# Of activations and of cached keys and values, which dsquant does not round.
_OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale")


def in_deepseeks_words(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a config whose `quantization_config` describes FP8 weights as DeepSeek's does; any other as it is,
    in config.json or in ModelOpt's own file.

    Raises InputError where compressed-tensors' groups differ, or FP8 is of a kind that is not supported.
    """
    quantization = config.get("quantization_config")
    if quantization is None and (folder / MODELOPT_FILE).is_file():
        found = read_json_object(folder / MODELOPT_FILE).get("quantization")
        quantization = {"quant_method": "modelopt", **found} if isinstance(found, dict) else None
    if not isinstance(quantization, dict):
        return config
    block = _block(folder, quantization)
    if block is None:
        return {**config, "quantization_config": quantization}
    words = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return {**config, "quantization_config": words}


def _block(folder: Path, quantization: Mapping[str, Any]) -> list[int] | None:
    """Returns rows and columns of a block; None where the config is of no such format."""
    method, layout = quantization.get("quant_method"), quantization.get("format")
    if method == "modelopt":
        algorithm = str(quantization.get("quant_algo"))
        if algorithm in MODELOPT_FLOAT4:
            return None
        if algorithm not in MODELOPT_STRATEGIES:
            raise InputError(
                f"{folder}: ModelOpt's quant_algo {algorithm!r:.40} is not read as a source; dsquant reads "
                f"{', '.join(MODELOPT_STRATEGIES)}"
            )
        return BLOCKS.get(MODELOPT_STRATEGIES[algorithm], MODELOPT_BLOCK)
    if method != "compressed-tensors" or layout != "float-quantized":
        return None
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    schemes = [group.get("weights") if isinstance(group, dict) else group for group in found]
    blocks = [_of_scheme(scheme) for scheme in schemes]
    if not blocks or None in blocks or any(block != blocks[0] for block in blocks):
        raise InputError(
            f"{folder / CONFIG_FILE}: float-quantized weights of schemes {schemes!r:.120} cannot be read; dsquant "
            "reads 8 bits by channel, tensor or block, alike for all linears"
        )
    return blocks[0]


def _of_scheme(scheme: Any) -> list[int] | None:
    if not isinstance(scheme, dict) or scheme.get("num_bits") != 8 or scheme.get("type") != "float":
        return None
    if scheme.get("strategy") == "block":
        return scheme.get("block_structure")
    return BLOCKS.get(str(scheme.get("strategy")))


def under_deepseeks_names(index: ShardIndex) -> tuple[ShardIndex, tuple[str, ...]]:
    """Returns an index in which the scales of FP8 weights have DeepSeek's names and two dimensions, and notes."""
    tensors: dict[str, TensorInfo] = {}
    left_out = 0
    for name, info in index.items():
        weight = index.get(name.removesuffix("_scale")) if name.endswith(_SCALE) else None
        if weight is not None and weight.dtype == FP8:
            shape = (*info.shape, *(1,) * (2 - len(info.shape)))
            new = weight.name + SCALE_SUFFIX
            tensors[new] = replace(info, name=new, shape=shape, stored_name=info.stored_name or name)
        elif name.endswith(_OF_ACTIVATIONS):
            left_out += 1
        else:
            tensors[name] = info
    if tensors.keys() == index.keys():
        return index, ()
    note = f"{left_out} scales of activations are left out: only weights are read"
    return ShardIndex(index.folder, dict(sorted(tensors.items()))), (note,) if left_out else ()
