"""From trained weights to R1's layout: outlier channels, FP8 blocks, shards that pairs straddle, index, configs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny_r1.network import Config

BLOCK = 128
LARGEST_FP8 = 448.0
NUM_SHARDS = 4
# Norm -> what reads it: everything, the router included.
CONSUMERS = {
    "input_layernorm": (
        "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
        "indexer.wk",
        "indexer.weights_proj",
    ),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj", "indexer.wq_b"),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
    "post_attention_layernorm": ("gate_proj", "up_proj", "mlp.gate"),
}
PLAIN = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "shared_head", "indexer.weights_proj")


def add_outliers(weights: dict[str, torch.Tensor], seed: int, remove: bool = False) -> dict[str, torch.Tensor]:
    """Gives norms the outlier channels that large models have, without changing the function; or takes them out again.

    Each gain is multiplied by a log-normal factor (sigma 0.5; every 64th channel ten times that), and the columns of
    all its consumers are divided by it.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = dict(weights)
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    for layer in range(len(layers)):
        prefix = f"model.layers.{layer}."
        for norm, consumers in CONSUMERS.items():
            gain = changed[f"{prefix}{norm}.weight"]
            factor = torch.exp(0.5 * torch.randn(len(gain), generator=generator))
            factor[torch.randperm(len(gain), generator=generator)[: len(gain) // 64]] *= 10
            if remove:
                factor = 1 / factor
            changed[f"{prefix}{norm}.weight"] = gain * factor
            for name in weights:
                if name.startswith(prefix) and name.removesuffix(".weight").endswith(consumers):
                    changed[name] = changed[name] / factor
    return changed


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn and one float32 scale for each begun 128x128 block."""
    rows, columns = -(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST_FP8
    scaled = (blocks / scales[:, None, :, None]).reshape(padded.shape)
    return scaled[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scales


def from_fp8(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values that a float8 weight and the scales of its blocks stand for."""
    wide = scales.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return weight.float() * wide


def stored(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as R1 stores them."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = weight
        elif weight.dim() == 2 and not any(part in name for part in PLAIN):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    return tensors


def save(weights: dict[str, torch.Tensor], folder: Path, config: Config) -> None:
    """Writes shards of about equal size in the order of names, index, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = stored(weights)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    done = 0
    for name, tensor in tensors.items():
        shard = min(NUM_SHARDS, 1 + done * NUM_SHARDS // total)
        weight_map[name] = f"model-{shard:05d}-of-{NUM_SHARDS:05d}.safetensors"
        done += tensor.nbytes
    # R1's shards are cut without regard to pairs; make sure that at least one pair is cut here as well.
    pairs = [name for name in tensors if f"{name}_scale_inv" in tensors]
    if all(weight_map[name] == weight_map[f"{name}_scale_inv"] for name in pairs):
        last = max(name for name in pairs if weight_map[name].startswith("model-00001"))
        weight_map[f"{last}_scale_inv"] = weight_map[last].replace("model-00001", "model-00002")
    for file_name in sorted(set(weight_map.values())):
        inside = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file_name}
        save_file(inside, folder / file_name, metadata={"format": "pt"})
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True}
    generation |= {"temperature": 0.6, "top_p": 0.95}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", dict(sorted({**config, "quantization_config": quantization}.items())))
    _write_json(folder / "generation_config.json", generation)


def load_config(folder: Path) -> Config:
    """The config that a folder was written with."""
    config: Config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    return config


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a written folder in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale_inv"):
            scales = tensors.get(f"{name}_scale_inv")
            weights[name] = tensor.float() if scales is None else from_fp8(tensor, scales)
    return weights


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
