"""Grouped-query attention: query heads share heads of keys and values. Llama, Qwen and GLM-4.5 have it."""

from collections.abc import Collection
from functools import lru_cache
from typing import Any

from dsquant.model.families.family import Cache, Config, ReadKey
from dsquant.model.structure import ScaleGroup

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# The linear that engines make of several that read one input.
FUSED_BY_ENGINES = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
HEAD_NORM_NAMES = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


@lru_cache(1)  # one for all layers
def _value_rows(heads: int, key_value_heads: int, head_dim: int) -> tuple[int, ...]:
    """v_proj's row behind each column of o_proj: query heads of one group share a value head."""
    return tuple(
        head // (heads // key_value_heads) * head_dim + row for head in range(heads) for row in range(head_dim)
    )


def groups(prefix: str, config: Config) -> tuple[ScaleGroup, ...]:
    """The scale groups inside attention of the layer whose module is `prefix`."""
    attention, heads = f"{prefix}.self_attn", config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    value_rows = _value_rows(heads, config.get("num_key_value_heads") or heads, head_dim)
    inputs = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    return (
        ScaleGroup(f"{prefix}.input_layernorm", inputs),
        ScaleGroup(f"{attention}.v_proj", (f"{attention}.o_proj",), producer_rows=value_rows),
    )


def cache(config: Config) -> Cache:
    """Keys and values of every key-value head."""
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    key_value_heads = int(config.get("num_key_value_heads") or heads)
    return Cache(key_value_heads, 2 * key_value_heads * int(head_dim), is_shared=False)


def keys(config: Config) -> dict[str, Any]:
    """Attention's numbers in a GGUF file."""
    head = config["head_dim"]
    rotated = int(head * (config["rope_parameters"].get("partial_rotary_factor") or 1))
    return {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": rotated,
    }


def config_of(key: ReadKey, tensors: Collection[str] = ()) -> dict[str, Any]:
    """config.json's entries for attention, from a GGUF file's numbers."""
    head = key("attention.key_length", key("embedding_length") // key("attention.head_count"))
    rotated = key("rope.dimension_count", head)
    return {"head_dim": head} | ({"partial_rotary_factor": rotated / head} if rotated != head else {})
