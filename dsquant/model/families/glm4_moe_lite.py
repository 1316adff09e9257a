"""GLM-4.7-Flash: DeepSeek-V3's network, latent attention and routed experts, with GLM's tokenizer.

transformers ignores `first_k_dense_replace` here: it builds one dense layer, or what `mlp_layer_types` says.
"""

from dataclasses import replace

from dsquant.model.families import deepseek_v3, mlps
from dsquant.model.families.family import Config

DENSE_LAYERS = 1


def _refuse(config: Config) -> str | None:
    problem = deepseek_v3.network_problem(config) or mlps.layer_types_problem(config)
    if problem:
        return problem
    dense = config["first_k_dense_replace"]
    if "mlp_layer_types" not in config and dense != DENSE_LAYERS:
        return f"first_k_dense_replace {dense!r:.40} is not supported: GLM-4.7-Flash has {DENSE_LAYERS} dense layer"
    return None


GLM4_MOE_LITE = replace(
    deepseek_v3.DEEPSEEK_V3,
    architecture="Glm4MoeLiteForCausalLM",
    releases="GLM-4.7-Flash",
    config_class="Glm4MoeLiteConfig",
    model_types=("glm4_moe_lite",),
    gguf=replace(deepseek_v3.DEEPSEEK_V3.gguf, pre_tokenizers={"llama-bpe": "glm4"}),
    mtp_shared=("embed_tokens", "shared_head.head"),
    refuse=_refuse,
)
