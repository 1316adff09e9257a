"""GLM-5, GLM-5.1, 5.2 and 5.3: DeepSeek-V3.2's network with an indexer that rotates neighbouring dimensions.

Since GLM-5.2 most layers have no indexer: they see what the last one before them has chosen.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dsquant.model.families import indexer
from dsquant.model.families.deepseek_v32 import DEEPSEEK_V32, refusing
from dsquant.model.families.family import Family, ReadKey, SparseAttention


def _gguf_config(key: ReadKey, tensors: Collection[str]) -> dict[str, Any]:
    layers = key("block_count") - key("nextn_predict_layers", 0)
    return DEEPSEEK_V32.gguf.config(key, tensors) | {indexer.TYPES_KEY: indexer.types_of(tensors, layers)}


GLM_MOE_DSA: Family = replace(
    DEEPSEEK_V32,
    architecture="GlmMoeDsaForCausalLM",
    releases="GLM-5, GLM-5.1, GLM-5.2, GLM-5.3 (FP8 or BF16)",
    config_class="GlmMoeDsaConfig",
    model_types=("glm_moe_dsa",),
    sparse=SparseAttention(rotates_neighbours=True),
    gguf=replace(DEEPSEEK_V32.gguf, architecture="glm-dsa", config=_gguf_config, pre_tokenizers={"llama-bpe": "glm4"}),
    mtp_types={indexer.TYPES_KEY: indexer.OWN},
    mtp_shared=("embed_tokens", "shared_head.head"),
    stated={**DEEPSEEK_V32.stated, "indexer_rope_interleave": True},  # vLLM takes halves where it is left out
    network_keys=(*DEEPSEEK_V32.network_keys, indexer.TYPES_KEY),
    refuse=refusing(rotates_neighbours=True),
)
