"""DeepSeek-V3, R1, R1-0528, V3-0324, V3.1 and Kimi-K2: latent attention (MLA) and routed experts.

Routed experts, shared expert and router read `post_attention_layernorm`: all of them are in its scale group.
"""

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from dsquant.model.families import mla, mlps, mtp
from dsquant.model.families.family import NORMS, Family, GgufFacts, ReadKey, Shapes
from dsquant.model.structure import DecoderLayer, Mlp, ScaleGroup, gates_and_ups


@lru_cache(1)  # one for all layers
def _value_rows(heads: int, nope: int, value: int) -> tuple[int, ...]:
    """Each head's rows of kv_b_proj: `nope` rows of keys, then `value` rows that o_proj reads in the order of heads."""
    return tuple(head * (nope + value) + nope + row for head in range(heads) for row in range(value))


def _attention(prefix: str, config: Mapping[str, Any]) -> tuple[ScaleGroup, ...]:
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


def _mlp(kind: Any, prefix: str, expert: int | None = None) -> Mlp:
    return Mlp(kind, f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj", expert)


def _mlps(prefix: str, config: Mapping[str, Any], index: int) -> tuple[Mlp, ...]:
    if index < config["first_k_dense_replace"]:
        return (_mlp("dense", f"{prefix}.mlp"),)
    experts = (_mlp("routed", f"{prefix}.mlp.experts.{expert}", expert) for expert in range(config["n_routed_experts"]))
    return _mlp("shared", f"{prefix}.mlp.shared_experts"), *experts


def decoder_layer(config: Mapping[str, Any], index: int) -> DecoderLayer:
    """Layer `index`; the multi-token-prediction layer behind the last one is built the same way.

    Args:
        config: config.json's content.
        index: number of the layer.

    Returns:
        The layer's structure.
    """
    prefix = f"model.layers.{index}"
    attention = _attention(prefix, config)
    linears = tuple(name for group in attention for name in group.consumers)
    mlps = _mlps(prefix, config, index)
    router = None if mlps[0].kind == "dense" else f"{prefix}.mlp.gate.weight"
    followers = () if router is None else (router,)
    mlp_norm = ScaleGroup(f"{prefix}.post_attention_layernorm", gates_and_ups(mlps), followers)
    queries = "q_proj" if config.get("q_lora_rank") is None else "q_b_proj"
    absorbed = (f"{prefix}.self_attn.{queries}", f"{prefix}.self_attn.kv_b_proj")
    return DecoderLayer(index, attention, linears, mlp_norm, router, mlps, absorbed)


# Every release has these; where one is left out, engines assume different things.
NEEDED = (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace",
    "moe_intermediate_size", "n_group", "topk_group",
)  # fmt: skip


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("index_topk") or config.get("index_n_heads"):
        return "sparse attention with an indexer (DeepSeek-V3.2) is not supported"
    if config.get("moe_layer_freq", 1) != 1:
        return f"moe_layer_freq {config['moe_layer_freq']} is not supported (R1 has 1)"
    if config.get("scoring_func", "sigmoid") != "sigmoid" or config.get("topk_method", "noaux_tc") != "noaux_tc":
        return (
            f"routing by scoring_func={config.get('scoring_func')!r}, topk_method={config.get('topk_method')!r} "
            "is not DeepSeek-V3's (sigmoid, noaux_tc)"
        )
    missing = [name for name in NEEDED if config.get(name) is None]
    if missing:
        return f"config.json lacks {', '.join(missing)}"
    rope, head_dim = config["qk_rope_head_dim"], config.get("head_dim")
    if head_dim not in (None, rope):
        return f"head_dim {head_dim!r:.40} is not qk_rope_head_dim {rope!r:.40}, whose width rotary embedding has here"
    heads, of_keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if of_keys not in (None, heads):
        return (
            f"num_key_value_heads {of_keys!r:.40} is not num_attention_heads {heads!r:.40}, as latent attention needs"
        )
    if not config.get("n_shared_experts"):
        return "a mixture without a shared expert is not supported"
    return _routing_problem(config)


def _routing_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers that choose experts: no tensor's shape would show it."""
    experts, groups = config.get("n_routed_experts"), config["n_group"]
    kept, chosen = config["topk_group"], config.get("num_experts_per_tok")
    counts = (experts, groups, kept, chosen)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        return f"n_routed_experts, n_group, topk_group, num_experts_per_tok must be positive numbers, found {counts}"
    if experts % groups or kept > groups or chosen > experts // groups * kept:
        return (
            f"{chosen} of {experts} experts cannot be chosen from {kept} of {groups} groups (num_experts_per_tok, "
            "n_routed_experts, topk_group, n_group)"
        )
    if experts // groups < 2:  # a group is ranked by the sum of its two best scores
        return f"groups of one expert cannot be ranked (n_routed_experts {experts}, n_group {groups})"
    return None


# Numbers of layers by which llama.cpp knows DeepSeek-V2-Lite and its kin, whose queries are projected directly.
LITE_LAYERS = (26, 27)
LITE_LAYERS_AND_TOKENS = (48, 128256)


def _gguf_tensors(config: Mapping[str, Any], layer: int) -> tuple[Shapes, Shapes]:
    needed, allowed = mlps.mixture_tensors(config, layer)
    norms = dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (config["hidden_size"],))
    return {**norms, **mla.tensors(config), **needed}, allowed


def _gguf_config(key: ReadKey, _: Collection[str]) -> dict[str, Any]:
    routing = {"moe_layer_freq": 1, "scoring_func": mlps.scoring(key), "topk_method": "noaux_tc"}
    return mla.config_of(key) | mlps.mixture_config(key) | routing


def _gguf_problems(config: Mapping[str, Any]) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    lite = layers in LITE_LAYERS or (layers, config["vocab_size"]) == LITE_LAYERS_AND_TOKENS
    if lite != (config["q_lora_rank"] is None):
        yield (
            f"q_lora_rank {config['q_lora_rank']} with {layers} layers: llama.cpp looks for directly projected queries "
            f"in models of {LITE_LAYERS[0]} or {LITE_LAYERS[1]} layers (or {LITE_LAYERS_AND_TOKENS[0]} with "
            f"{LITE_LAYERS_AND_TOKENS[1]} tokens), and nowhere else"
        )
    yield from mla.gguf_problems(config)
    yield from mlps.mixture_problems(config)


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    config_class="DeepseekV3Config",
    model_types=("deepseek_v3", "kimi_k2"),
    layer=decoder_layer,
    cache=mla.cache,
    mixture=mlps.DEEPSEEK,
    gguf=GgufFacts(
        architecture="deepseek2",
        modules={**NORMS, **mla.NAMES, **mlps.MIXTURE_NAMES, **mtp.NAMES},
        tensors=_gguf_tensors,
        keys=lambda config: mla.keys(config) | mlps.mixture_keys(config),
        config=_gguf_config,
        rope_scalings=("default", "yarn"),
        problems=_gguf_problems,
        split=mla.KEYS_AND_VALUES,
    ),
    mtp_key=mtp.COUNT_KEY,
    network_keys=mla.NETWORK_KEYS + mlps.NETWORK_KEYS,
    fused_experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    refuse=_refuse,
)
