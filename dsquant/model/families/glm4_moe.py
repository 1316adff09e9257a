"""GLM-4.5, GLM-4.5-Air, 4.6 and 4.7: grouped-query attention that rotates half of each head, and routed experts.

Routing is DeepSeek-V3's (sigmoids with a correcting bias, one group). Queries and keys have norms in the large models.
"""

from collections.abc import Collection
from typing import Any

from dsquant.model.families import gqa, mlps, mtp
from dsquant.model.families.family import Config, Family, GgufFacts, ReadKey
from dsquant.model.structure import DecoderLayer

# Every release has these; transformers and other engines assume different things where one is left out.
NEEDED = (
    "head_dim", "num_key_value_heads", "first_k_dense_replace", "moe_intermediate_size", "n_shared_experts",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}


def decoder_layer(config: Config, index: int) -> DecoderLayer:
    """Layer `index`; the multi-token-prediction layer behind the last one is built the same way."""
    prefix = f"model.layers.{index}"
    return mlps.layer_of(index, gqa.groups(prefix, config), mlps.mixture(prefix, config, index))


def _refuse(config: Config) -> str | None:
    missing = [name for name in NEEDED if config.get(name) is None]
    if missing:
        return f"config.json lacks {', '.join(missing)}"
    if config.get("scoring_func", "sigmoid") != "sigmoid":
        return f"routing by scoring_func={config['scoring_func']!r} is not GLM-4.5's (sigmoid)"
    for key in ("sliding_window", "use_sliding_window", "mlp_bias"):
        if config.get(key):
            return f"{key} {config[key]!r:.80} is not supported: this architecture has nothing of the kind"
    return mlps.routing_problem(config)


def _gguf_config(key: ReadKey, tensors: Collection[str]) -> dict[str, Any]:
    attention, scoring = gqa.config_of(key), mlps.scoring(key, "sigmoid")
    return attention | mlps.mixture_config(key) | {
        "partial_rotary_factor": attention.get("partial_rotary_factor", 1.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    } | ({} if scoring == "sigmoid" else {"scoring_func": scoring})  # fmt: skip


GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    releases="GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    config_class="Glm4MoeConfig",
    model_types=("glm4_moe",),
    layer=decoder_layer,
    cache=gqa.cache,
    mixture=mlps.DEEPSEEK,
    gguf=GgufFacts(
        architecture="glm4moe",
        modules={**NORMS, **gqa.NAMES, **gqa.HEAD_NORM_NAMES, **mlps.MIXTURE_NAMES, **mtp.NAMES},
        keys=lambda config: gqa.keys(config) | mlps.mixture_keys(config),
        config=_gguf_config,
        biases=gqa.PROJECTIONS,
        problems=mlps.mixture_problems,
        pre_tokenizers={"llama-bpe": "glm4"},
    ),
    mtp_key=mtp.COUNT_KEY,
    mtp_shared=("embed_tokens", "shared_head.head"),  # since GLM-4.6
    states=("partial_rotary_factor", "use_qk_norm"),
    network_keys=("use_qk_norm", *mlps.NETWORK_KEYS),
    fused_experts=mlps.FUSED,
    refuse=_refuse,
)
