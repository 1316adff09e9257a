"""Architectures as the smallest models that have all their parts: one entry a family, and what it refuses."""

from dataclasses import dataclass, field
from typing import Any

from checkpoints import DENSE, LLAMA, QWEN2, QWEN3

# Dimensions that K-quants' rows of 256 do not fit: jobs fall back to Q8_0 and its like, as llama.cpp's own do.
NARROW = DENSE | {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "attention_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A family's smallest model."""

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes of the config that other releases have, by name."""
    refused: tuple[tuple[dict[str, Any], str], ...] = ()
    """Changes of the config, and what their error says."""


QWEN3_MOE = Architecture(
    NARROW | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": False,
    },
    {"shares that sum to less than 1": {"norm_topk_prob": False}},
    (
        ({"norm_topk_prob": None}, "lacks norm_topk_prob"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"num_experts_per_tok": 5}, "5 of 4 experts cannot be chosen"),
        ({"use_sliding_window": True}, "sliding-window"),
    ),
)  # fmt: skip

GLM4_MOE = Architecture(
    NARROW | {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5,
        "num_nextn_predict_layers": 1,
    },
    {
        "Air, with yarn": {
            "use_qk_norm": False,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        "no bias": {"attention_bias": False},
    },
    (
        ({"head_dim": None}, "lacks head_dim"),
        ({"n_shared_experts": 0}, "without a shared expert"),
        ({"num_experts_per_tok": 9}, "9 of 4 experts cannot be chosen"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"sliding_window": 64}, "sliding_window 64"),
    ),
)  # fmt: skip

# What DeepSeek-V3 and its successors have.
LATENT = NARROW | {
    "num_key_value_heads": 4, "head_dim": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
GLM4_MOE_LITE = Architecture(
    LATENT | {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "topk_method": "noaux_tc",
        "partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5,
    },
    {"two groups": {"n_group": 2, "topk_group": 1}},
    (
        ({"first_k_dense_replace": 2}, "has 1 dense layer"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "are not first_k_dense_replace 1 dense layers"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ),
)  # fmt: skip
# More tokens than a query sees: the indexer chooses. With the few heads of the others many scores are 0, a sum of what
# relu cuts off, and which of these keys is seen would be arbitrary; releases have 32 or 64.
SPARSE = {"index_topk": 16, "index_n_heads": 32}
YARN = {
    "rope_scaling": {
        "type": "yarn", "factor": 8, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    }
}  # fmt: skip
DEEPSEEK_V3 = Architecture(
    LATENT | YARN | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_group": 2, "topk_group": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
    {"Kimi-K2": {"n_group": 1, "routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0}},
)  # fmt: skip
DEEPSEEK_V2 = Architecture(
    LATENT | YARN | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax",
        "topk_method": "greedy", "norm_topk_prob": False, "n_shared_experts": 2, "num_nextn_predict_layers": 0,
    },
    {
        "groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        # llama.cpp knows it by its 27 layers; its F16 keys and values would lead tokens of more mixtures elsewhere.
        "Lite": {"q_lora_rank": None, "num_hidden_layers": 27, "first_k_dense_replace": 26, "hidden_size": 64},
    },
    (
        ({"norm_topk_prob": True}, "norm_topk_prob true"),
        ({"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ),
)  # fmt: skip
DEEPSEEK_V32 = Architecture(
    LATENT | YARN | {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "n_group": 2, "topk_group": 1,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "index_topk": 2048, "index_head_dim": 128,
        "index_n_heads": 4,
    },
    {"with fewer keys than tokens": SPARSE},
    (
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        ({"indexer_rope_interleave": True}, "indexer_rope_interleave True"),
        ({"index_topk": 0}, "index_topk is 0"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"mlp_layer_types": ["sparse", "sparse"]}, "are not first_k_dense_replace 1 dense layers"),
    ),
)  # fmt: skip
GLM_MOE_DSA = Architecture(
    LATENT | {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa",
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-5, "index_topk": 2048,
        "index_head_dim": 128, "index_n_heads": 4, "indexer_rope_interleave": True,
        "indexer_types": ["full", "shared"],
    },
    {"with fewer keys than tokens": SPARSE | {"indexer_types": ["full"] * 2}},
    (
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave False"),
        ({"indexer_types": ["shared", "full"]}, "the first 'full'"),
        ({"indexer_types": 5}, "indexer_types 5: expected"),
        ({"indexer_types": [["full"], "full"]}, r"indexer_types \[\['full'\], 'full'\]"),
    ),
)  # fmt: skip
ARCHITECTURES = {
    "DeepSeek-V3": DEEPSEEK_V3,
    "DeepSeek-V2": DEEPSEEK_V2,
    "DeepSeek-V3.2": DEEPSEEK_V32,
    "GLM-5": GLM_MOE_DSA,
    "GLM-4.5": GLM4_MOE,
    "GLM-4.7-Flash": GLM4_MOE_LITE,
    "Qwen3 MoE": QWEN3_MOE,
    "Llama": Architecture(LLAMA, {"with biases": {"attention_bias": True}}),
    "Qwen2": Architecture(QWEN2, {"tied": {"tie_word_embeddings": True}}),
    "Qwen3": Architecture(QWEN3),
}
# All that llama.cpp and kernels look at in models of 27 layers: their real heads and latents, narrow elsewhere.
LITE = {
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_shared_experts": 2,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
OF_27_LAYERS = {
    "DeepSeek-V2-Lite": DEEPSEEK_V2.config | LITE | {
        "routed_scaling_factor": 1.0,
        "rope_scaling": YARN["rope_scaling"] | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "Moonlight": DEEPSEEK_V3.config | LITE | {
        "n_group": 1, "routed_scaling_factor": 2.446, "rope_theta": 50000.0, "rope_scaling": None, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
# Variants that llama.cpp computes otherwise, so that their files are refused: what the error says, and the keys that
# would say it to llama.cpp.
NOT_IN_LLAMA_CPP: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3 MoE: shares that sum to less than 1": (
        "norm_topk_prob false: llama.cpp's qwen3moe lets the shares of the chosen experts sum to 1",
        {"qwen3moe.expert_weights_norm": False},
    ),
    "DeepSeek-V2: groups": (
        "topk_method group_limited_greedy: llama.cpp ranks groups by their two best experts, DeepSeek-V2 by the best",
        {"deepseek2.expert_group_count": 2, "deepseek2.expert_group_used_count": 1},
    ),
}
