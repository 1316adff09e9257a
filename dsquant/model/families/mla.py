"""Latent attention (MLA): all heads share one latent of keys and values, with a rotary key beside it.

llama.cpp absorbs queries into kv_b_proj's keys, so that its attention has one key-value head: the latent.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dsquant.model.families.family import Cache, Config, ReadKey, SplitLinear
from dsquant.model.rotary import yarn_mscale
from dsquant.model.structure import Absorbed, ScaleGroup

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
}
KEYS_AND_VALUES = SplitLinear(
    module="self_attn.kv_b_proj",
    keys="attn_k_b",
    values="attn_v_b",
    shape=lambda config: (
        config["num_attention_heads"],
        config["qk_nope_head_dim"],
        config["v_head_dim"],
        config["kv_lora_rank"],
    ),
)
# The linear that engines make of several that read one input, as vLLM and as SGLang call it.
FUSED_BY_ENGINES = dict.fromkeys(("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"), ("q_a_proj", "kv_a_proj_with_mqa"))
NETWORK_KEYS = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave"
)  # fmt: skip
# transformers normalizes latents with this epsilon whatever the config says, llama.cpp with the config's.
LATENT_EPSILON = 1e-6
LARGEST_EPSILON = 1e-4


@lru_cache(1)  # one for all layers
def _value_rows(heads: int, nope: int, value: int) -> tuple[int, ...]:
    """Each head's rows of kv_b_proj: `nope` rows of keys, then `value` rows that o_proj reads in the order of heads."""
    return tuple(head * (nope + value) + nope + row for head in range(heads) for row in range(value))


def groups(prefix: str, config: Config) -> tuple[ScaleGroup, ...]:
    """The scale groups inside attention of the layer whose module is `prefix`."""
    attention = f"{prefix}.self_attn"
    value_rows = _value_rows(config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"])
    key_value = ScaleGroup(f"{attention}.kv_a_layernorm", (f"{attention}.kv_b_proj",))
    output = ScaleGroup(f"{attention}.kv_b_proj", (f"{attention}.o_proj",), producer_rows=value_rows)
    if config.get("q_lora_rank") is None:  # Moonlight projects queries directly
        first = ScaleGroup(f"{prefix}.input_layernorm", (f"{attention}.q_proj", f"{attention}.kv_a_proj_with_mqa"))
        return first, key_value, output
    first = ScaleGroup(f"{prefix}.input_layernorm", (f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"))
    query = ScaleGroup(f"{attention}.q_a_layernorm", (f"{attention}.q_b_proj",))
    return first, query, key_value, output


def absorbed(prefix: str, config: Config) -> Absorbed:
    """The linears that engines multiply with one another."""
    queries = "q_proj" if config.get("q_lora_rank") is None else "q_b_proj"
    names = (f"{prefix}.self_attn.{queries}", f"{prefix}.{KEYS_AND_VALUES.module}")
    return Absorbed(*names, config["num_attention_heads"], config["qk_nope_head_dim"])


def cache(config: Config) -> Cache:
    """The latent and the rotary key, which all heads share."""
    return Cache(1, int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]), is_shared=True)


def score_scale(hf_config: Any) -> float:
    """The factor on the scores, which yarn enlarges."""
    rope, scale = hf_config.rope_parameters, hf_config.qk_head_dim**-0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def keys(config: Config) -> dict[str, Any]:
    """Attention's numbers in a GGUF file."""
    latent, rope, query = config["kv_lora_rank"], config["qk_rope_head_dim"], config["q_lora_rank"]
    of_queries = {} if query is None else {"attention.q_lora_rank": query}
    return {"attention.head_count_kv": 1} | of_queries | {
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope,
    }  # fmt: skip


def config_of(key: ReadKey) -> dict[str, Any]:
    """config.json's entries for attention, from a GGUF file's numbers."""
    rope = key("rope.dimension_count")
    return {
        "num_key_value_heads": key("attention.head_count"),
        "q_lora_rank": key("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": key("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key("attention.key_length_mla") - rope,
        "v_head_dim": key("attention.value_length_mla"),
    }


def gguf_problems(config: Config) -> Iterator[str]:
    """What llama.cpp's latent attention computes differently from the network, in words."""
    if not config.get("rope_interleave", True):
        yield "rope_interleave false: llama.cpp rotates neighbouring dimensions"
    if config["rms_norm_eps"] != LATENT_EPSILON and config["rms_norm_eps"] > LARGEST_EPSILON:
        yield (
            f"rms_norm_eps {config['rms_norm_eps']}: llama.cpp normalizes latents with it too, the model with "
            f"{LATENT_EPSILON}"
        )
