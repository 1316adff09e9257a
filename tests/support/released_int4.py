"""Kimi-K2-Thinking as it is released: experts in compressed-tensors' 4 bits, all else in BF16."""

from pathlib import Path
from typing import Any

import torch
from architectures import LATENT
from checkpoints import add_tokenizer, put_outliers_into_norms, random_weights, save_checkpoint, stored
from random_models import shapes_of
from safetensors.torch import load_file

GROUP = 32
PREFIX = "language_model."
"""Of every name in K2.5, whose config is a wrapper."""
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip
KIMI = LATENT | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 0, "quantization_config": QUANTIZATION,
}  # fmt: skip


def packed(weight_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a weight, as compressed-tensors packs it with 15 of 16 codes, and its values."""
    groups_OGS = weight_OI.unflatten(1, (-1, GROUP))
    scales_OG = (groups_OGS.abs().amax(2) / 7).to(torch.bfloat16)
    codes_OI = (groups_OGS / scales_OG.float().unsqueeze(2)).round().clamp(-7, 7).flatten(1).to(torch.int64)
    shifts = 4 * torch.arange(8)
    words = ((codes_OI + 8).unflatten(1, (-1, 8)) << shifts).sum(2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    values_OI = (codes_OI.unflatten(1, (-1, GROUP)) * scales_OG.float().unsqueeze(2)).flatten(1)
    parts = {"_packed": words, "_scale": scales_OG, "_shape": torch.tensor(weight_OI.shape)}
    return parts, values_OI


def make(
    folder: Path, prefix: str = "", outliers: bool = False, **changes: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A model with experts in 4 bits, and their values; with outliers in its norms every search finds scales."""
    config, values = KIMI | changes, {}
    weights = random_weights(shapes_of(config))
    if outliers:
        put_outliers_into_norms(config, weights)
    tensors = stored(weights, fp8=False)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        parts, values[name] = packed(tensors.pop(name).float())
        tensors |= {name + suffix: part for suffix, part in parts.items()}
    if prefix:
        config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": config}
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    return add_tokenizer(save_checkpoint(folder, config, renamed), vocabulary=280), values


def in_float32(folder: Path, release: Path, values: dict[str, torch.Tensor]) -> Path:
    """The same network, nothing in 4 bits: a release's other tensors, and the values of its experts."""
    config = {key: value for key, value in KIMI.items() if key != "quantization_config"}
    tensors = {name: tensor for shard in release.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    others = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    others = {name: tensor for name, tensor in others.items() if ".mlp.experts." not in name}
    return save_checkpoint(folder, config, others | values)
