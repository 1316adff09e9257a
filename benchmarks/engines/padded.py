"""A DeepSeek-V3 model with R1's own sizes of heads and latents that computes what a smaller one does.

Kernels of engines are made for R1's 128, 64, 128 and 512 columns, and refuse tiny-r1's or take other paths for them.
Every copy of a part divides what it adds by the number of copies, so the function stays.

Shape legend: h heads, N columns of a head without position, R with, D columns of its values, K latent, H hidden.
"""

from collections.abc import Mapping
from typing import Any

import torch

HEADS, NOPE, VALUES, LATENT = 16, 128, 128, 512


def padded(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the larger model, float32."""
    return {name: _padded(name, weights[name], config) for name in weights}


def padded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the larger model, which is stored in BF16."""
    sizes = {"qk_nope_head_dim": NOPE, "v_head_dim": VALUES, "kv_lora_rank": LATENT}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    return {key: value for key, value in config.items() if key != "quantization_config"} | sizes | heads


def _padded(name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    heads, nope, rope = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    latent, values = config["kv_lora_rank"], config["v_head_dim"]
    copies, in_head, in_latent = HEADS // heads, NOPE // nope, LATENT // latent
    if name.endswith("self_attn.q_b_proj.weight"):
        # scores are divided by the root of a head's columns, which are more now
        parts_hQI = weight.unflatten(0, (heads, nope + rope)) * ((NOPE + rope) / (nope + rope)) ** 0.5
        keys, turned = parts_hQI.split([nope, rope], 1)
        wide = torch.cat([keys.repeat(1, in_head, 1) / in_head, turned], 1)
        return wide.repeat_interleave(copies, 0).flatten(0, 1)
    if name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
        return torch.cat([weight[:latent].repeat(in_latent, 1), weight[latent:]])
    if name.endswith("self_attn.kv_a_layernorm.weight"):
        return weight.repeat(in_latent)
    if name.endswith("self_attn.kv_b_proj.weight"):
        keys, others = weight.unflatten(0, (heads, nope + values)).split([nope, values], 1)
        wide = torch.cat([keys.repeat(1, in_head, 1), others.repeat(1, VALUES // values, 1)], 1)
        return wide.repeat_interleave(copies, 0).flatten(0, 1).repeat(1, in_latent) / in_latent
    if name.endswith("self_attn.o_proj.weight"):
        wide_HhD = weight.unflatten(1, (heads, values)).repeat(1, 1, VALUES // values)
        return wide_HhD.repeat_interleave(copies, 1).flatten(1) / (copies * VALUES // values)
    return weight
