"""The dense families of the R1 distills: Llama, Qwen2 and Qwen3."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from dsquant.model.families import gqa, mlps
from dsquant.model.families.family import NORMS, Family, GgufFacts, Shapes
from dsquant.model.structure import DecoderLayer, Mlp, ScaleGroup, gates_and_ups


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


def _tensors(config: Mapping[str, Any]) -> Shapes:
    norms = dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (config["hidden_size"],))
    return {**norms, **gqa.tensors(config), **mlps.tensors(config)}


def _llama_tensors(config: Mapping[str, Any], _: int) -> tuple[Shapes, Shapes]:
    return _tensors(config), gqa.biases(config) | {"attn_output.bias": (config["hidden_size"],)}


def _qwen2_tensors(config: Mapping[str, Any], _: int) -> tuple[Shapes, Shapes]:
    return _tensors(config) | gqa.biases(config), {}  # older versions of llama.cpp need the biases


def _qwen3_tensors(config: Mapping[str, Any], _: int) -> tuple[Shapes, Shapes]:
    return _tensors(config) | gqa.head_norms(config), gqa.biases(config)


def _qwen2_problems(config: Mapping[str, Any]) -> Iterator[str]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if heads * config["head_dim"] != hidden:
        yield f"{heads} heads of {config['head_dim']}: llama.cpp's qwen2 wants hidden_size {hidden} divided among them"


def _gguf(architecture: str, tensors: Any, **more: Any) -> GgufFacts:
    modules = {**NORMS, **gqa.NAMES, **mlps.NAMES}
    return GgufFacts(architecture, modules, tensors, gqa.keys, gqa.config_of, **more)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    config_class="LlamaConfig",
    model_types=("llama",),
    layer=decoder_layer,
    cache=gqa.cache,
    gguf=_gguf(
        "llama",
        _llama_tensors,
        rope_scalings=("default", "linear", "yarn", "llama3"),
        interleaved=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    refuse=_refuse_llama,
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    model_types=("qwen2",),
    layer=decoder_layer,
    cache=gqa.cache,
    gguf=_gguf("qwen2", _qwen2_tensors, problems=_qwen2_problems),
    refuse=_refuse,
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    model_types=("qwen3",),
    layer=decoder_layer,
    cache=gqa.cache,
    gguf=_gguf("qwen3", _qwen3_tensors),
    refuse=_refuse,
)
