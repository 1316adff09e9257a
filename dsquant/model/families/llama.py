"""The dense families of the R1 distills: Llama, Qwen2 and Qwen3."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dsquant.model.structure import DecoderLayer, Family, Mlp, ScaleGroup, gates_and_ups


@lru_cache(1)  # one for all layers
def _value_rows(heads: int, key_value_heads: int, head_dim: int) -> tuple[int, ...]:
    """v_proj's row behind each column of o_proj: query heads of one group share a value head."""
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
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    value_rows = _value_rows(heads, config.get("num_key_value_heads") or heads, head_dim)
    inputs = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    groups = (
        ScaleGroup(f"{prefix}.input_layernorm", inputs),
        ScaleGroup(f"{attention}.v_proj", (f"{attention}.o_proj",), producer_rows=value_rows),
    )
    mlps = (Mlp("dense", f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"),)
    mlp_norm = ScaleGroup(f"{prefix}.post_attention_layernorm", gates_and_ups(mlps))
    return DecoderLayer(index, groups, (*inputs, f"{attention}.o_proj"), mlp_norm, None, mlps)


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("use_sliding_window"):
        return "sliding-window attention is not supported (no R1 distill uses it)"
    if config.get("mlp_bias"):
        return "MLPs with biases are not supported (no R1 distill has them)"
    return None


def _refuse_llama(config: Mapping[str, Any]) -> str | None:
    # Qwen's configs state a window beside `use_sliding_window: false`; Llama's state none unless they mean one.
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window") is not False:
        return f"sliding_window {window!r:.80}: sliding-window attention is not supported (no R1 distill uses it)"
    return _refuse(config)


LLAMA = Family("LlamaForCausalLM", "LlamaConfig", ("llama",), decoder_layer, refuse=_refuse_llama)
QWEN2 = Family("Qwen2ForCausalLM", "Qwen2Config", ("qwen2",), decoder_layer, refuse=_refuse)
QWEN3 = Family("Qwen3ForCausalLM", "Qwen3Config", ("qwen3",), decoder_layer, refuse=_refuse)
