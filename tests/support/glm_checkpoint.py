"""Small random checkpoints of GLM-4.5's family. (checkpoints.py trains its tokenizers on itself: it stays as it is.)"""

from pathlib import Path
from typing import Any

from checkpoints import DENSE, PICO_R1, r1_shapes, random_weights, save_checkpoint, stored

GLM: dict[str, Any] = DENSE | {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "num_hidden_layers": 3, "attention_bias": True,
    "use_qk_norm": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "moe_intermediate_size": 128,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 1,
}  # fmt: skip


def glm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a GLM-4.5 checkpoint: attention of the dense ones, mixtures and MTP of R1."""
    hidden, keys = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    of_r1 = r1_shapes(PICO_R1 | config | {"attention_bias": False})
    shapes = {name: shape for name, shape in of_r1.items() if ".self_attn." not in name}
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        for kind, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{attention}.{kind}_proj.weight"] = (rows, hidden)
            if config["attention_bias"]:
                shapes[f"{attention}.{kind}_proj.bias"] = (rows,)
        if config["use_qk_norm"]:
            shapes |= dict.fromkeys((f"{attention}.{kind}_norm.weight" for kind in "qk"), (config["head_dim"],))
        shapes[f"{attention}.o_proj.weight"] = (hidden, queries)
    return shapes


def make_glm(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random BF16 checkpoint of GLM-4.5's family: a dense layer, mixtures, and an MTP layer."""
    config = {**GLM, **changes, "torch_dtype": "bfloat16"}
    return save_checkpoint(folder, config, stored(random_weights(glm_shapes(config), seed), fp8=False))
