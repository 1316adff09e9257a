"""The dense families of the R1 distills: Llama, Qwen2 and Qwen3."""

from collections.abc import Mapping
from typing import Any

from dsquant.model.structure import DecoderLayer, Family, Mlp, ScaleGroup


def _value_rows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """v_proj's row behind each column of o_proj: query heads of one group share a value head."""
    heads = config["num_attention_heads"]
    key_value_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return tuple(
        head // (heads // key_value_heads) * head_dim + row for head in range(heads) for row in range(head_dim)
    )


def decoder_layer(config: Mapping[str, Any], index: int) -> DecoderLayer:
    """Layer `index`.

    Args:
        config: config.json's content.
        index: number of the layer.

    Returns:
        The layer's structure.
    """
    prefix = f"model.layers.{index}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    inputs = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    groups = (
        ScaleGroup(f"{prefix}.input_layernorm", inputs),
        ScaleGroup(f"{attention}.v_proj", (f"{attention}.o_proj",), producer_rows=_value_rows(config)),
    )
    mlps = (Mlp("dense", f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"),)
    return DecoderLayer(
        index, groups, (*inputs, f"{attention}.o_proj"), f"{prefix}.post_attention_layernorm", None, mlps
    )


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("use_sliding_window"):
        return "sliding-window attention is not supported (no R1 distill uses it)"
    if config.get("mlp_bias"):
        return "MLPs with biases are not supported (no R1 distill has them)"
    return None


LLAMA = Family("LlamaForCausalLM", "LlamaConfig", ("llama",), decoder_layer, refuse=_refuse)
QWEN2 = Family("Qwen2ForCausalLM", "Qwen2Config", ("qwen2",), decoder_layer, refuse=_refuse)
QWEN3 = Family("Qwen3ForCausalLM", "Qwen3Config", ("qwen3",), decoder_layer, refuse=_refuse)
