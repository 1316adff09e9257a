"""DeepSeek-V3, R1, R1-0528, V3-0324, V3.1 and Kimi-K2: latent attention (MLA) and routed experts.

Routed experts, shared expert and router read `post_attention_layernorm`: all of them are in its scale group.
"""

from collections.abc import Collection, Iterator
from typing import Any

from dsquant.model.families import mla, mlps, mtp
from dsquant.model.families.family import NORMS, Config, Family, GgufFacts, ReadKey
from dsquant.model.structure import DecoderLayer


def decoder_layer(config: Config, index: int) -> DecoderLayer:
    """Layer `index`; the multi-token-prediction layer behind the last one is built the same way."""
    prefix = f"model.layers.{index}"
    of_layer = mlps.mixture(prefix, config, index)
    return mlps.layer_of(index, mla.groups(prefix, config), of_layer, mla.absorbed(prefix, config))


# Every release has these; where one is left out, engines assume different things.
NEEDED = (
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace",
    "moe_intermediate_size", "n_group", "topk_group",
)  # fmt: skip


# How experts are chosen; vLLM 0.33 reads both where transformers' class needs neither.
ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def network_problem(config: Config) -> str | None:
    """What in a config is not this network, whatever its attention leaves out, in words; None where all is."""
    if config.get("moe_layer_freq", 1) != 1:
        return f"moe_layer_freq {config['moe_layer_freq']} is not supported (R1 has 1)"
    if any(config.get(key, value) != value for key, value in ROUTING.items()):
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
    return mlps.routing_problem(config)


def _refuse(config: Config) -> str | None:
    if config.get("index_topk") or config.get("index_n_heads"):
        return "sparse attention with an indexer belongs to DeepseekV32ForCausalLM"
    return network_problem(config)


# Numbers of layers by which llama.cpp knows DeepSeek-V2-Lite and its kin, whose queries are projected directly.
LITE_LAYERS = (26, 27)
LITE_LAYERS_AND_TOKENS = (48, 128256)


def _gguf_config(key: ReadKey, _: Collection[str]) -> dict[str, Any]:
    routing = {"moe_layer_freq": 1, "scoring_func": mlps.scoring(key, "softmax"), "topk_method": "noaux_tc"}
    return mla.config_of(key) | mlps.mixture_config(key) | routing


def _gguf_problems(config: Config) -> Iterator[str]:
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
    releases="DeepSeek-V3, R1, R1-0528, V3-0324, V3.1 (FP8, also ue8m0 scales; or BF16), Moonlight, Kimi-K2 and K2.5",
    config_class="DeepseekV3Config",
    model_types=("deepseek_v3", "kimi_k2"),
    layer=decoder_layer,
    cache=mla.cache,
    mixture=mlps.DEEPSEEK,
    gguf=GgufFacts(
        architecture="deepseek2",
        modules={**NORMS, **mla.NAMES, **mlps.MIXTURE_NAMES, **mtp.NAMES},
        keys=lambda config: mla.keys(config) | mlps.mixture_keys(config),
        config=_gguf_config,
        rope_scalings=("default", "yarn"),
        problems=_gguf_problems,
        split=mla.KEYS_AND_VALUES,
    ),
    score_scale=mla.score_scale,
    mtp_key=mtp.COUNT_KEY,
    stated=ROUTING,
    network_keys=(*mla.NETWORK_KEYS, *mlps.NETWORK_KEYS, *ROUTING),
    packed_types=("kimi_k2", "kimi_k25"),
    fused_experts=mlps.FUSED,
    refuse=_refuse,
)
