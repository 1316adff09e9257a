"""The network: transformers' DeepSeek-V3 with one multi-token-prediction layer behind the decoder.

Shape legend: N samples, T tokens, H hidden size, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tiny_r1.experts import count_loads

Config = dict[str, Any]
SMALL: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "kv_lora_rank": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 512,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 1280,
}
# Wide and deep enough that errors add up over layers and that some experts are rare; widths in multiples of 256,
# the block of llama.cpp's K-quants, but for kv_lora_rank.
MEDIUM: Config = SMALL | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "n_routed_experts": 16,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "vocab_size": 2048,
}
# A third as deep as R1, its experts chosen by an eighth of the tokens: 299M parameters, 65M of them for a token.
DEEP: Config = SMALL | {
    "first_k_dense_replace": 3,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "kv_lora_rank": 256,
    "n_routed_experts": 32,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 22,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "vocab_size": 4096,
}


class TinyR1(nn.Module):
    """The decoder's layers and the MTP layer, which is built as one more of them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        self.config = config
        self.masked = "index_topk" in config
        """Whether attention gets its causal mask: sparse attention needs it, and one that tells its weights."""
        self.num_layers: int = config["num_hidden_layers"]
        # A deep copy, since transformers adds keys of its own to the rope_scaling it is given.
        built = CONFIG_MAPPING[config["model_type"]].from_dict(
            {**copy.deepcopy(config), "num_hidden_layers": self.num_layers + 1}
        )
        self.model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="sdpa")
        hidden = config["hidden_size"]
        self.enorm, self.hnorm, self.head_norm = (nn.RMSNorm(hidden, eps=1e-6) for _ in range(3))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        nn.init.normal_(self.eh_proj.weight, std=0.02)
        self.mixtures = [layer.mlp for layer in self.model.model.layers if hasattr(layer.mlp, "experts")]
        for mixture in self.mixtures:
            loads = torch.zeros(config["n_routed_experts"], dtype=torch.int64)
            mixture.experts.register_buffer("loads", loads, persistent=False)
            mixture.experts.register_forward_pre_hook(count_loads)

    def _run(self, hidden_NTH: torch.Tensor, layers: Any) -> torch.Tensor:
        positions = torch.arange(hidden_NTH.shape[1], device=hidden_NTH.device).unsqueeze(0)
        rotary = self.model.model.rotary_emb(hidden_NTH, positions)
        later = torch.full((hidden_NTH.shape[1],) * 2, -torch.inf, device=hidden_NTH.device).triu(1)
        mask = later[None, None].expand(len(hidden_NTH), -1, -1, -1) if self.masked else None
        for layer in layers:
            hidden_NTH = layer(hidden_NTH, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return hidden_NTH

    def logits(self, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the next token [N, T, V], and the MTP layer's of the token after next [N, T - 1, V]."""
        decoder = self.model.model
        embedded = decoder.embed_tokens(tokens_NT)
        hidden = decoder.norm(self._run(embedded, decoder.layers[: self.num_layers]))
        both = torch.cat([self.enorm(embedded[:, 1:]), self.hnorm(hidden[:, :-1])], dim=-1)
        ahead = self.head_norm(self._run(self.eh_proj(both), decoder.layers[self.num_layers :]))
        return self.model.lm_head(hidden), self.model.lm_head(ahead)

    def losses(self, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the next token, and of the MTP layer's token after next."""
        following, after_next = self.logits(tokens_NT)
        first = _cross_entropy(following[:, :-1], tokens_NT[:, 1:])
        return first, _cross_entropy(after_next[:, :-1], tokens_NT[:, 2:])

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Moves every router's bias towards the experts with less than their share."""
        for mixture in self.mixtures:
            loads = mixture.experts.loads.float()
            mixture.gate.e_score_correction_bias += step * torch.sign(loads.mean() - loads)

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Every weight under its R1 name, float32: one tensor for each expert, the MTP layer's copies included."""
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if name.endswith("experts.gate_up_proj"):
                for expert, fused in enumerate(tensor):
                    gate, up = fused.chunk(2)
                    prefix = f"{name.removesuffix('.gate_up_proj')}.{expert}"
                    weights |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
            elif name.endswith("experts.down_proj"):
                prefix = name.removesuffix(".down_proj")
                weights |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
            elif "rotary" not in name:
                weights[name] = tensor
        mtp = f"model.layers.{self.num_layers}"
        weights |= {
            f"{mtp}.enorm.weight": self.enorm.weight,
            f"{mtp}.hnorm.weight": self.hnorm.weight,
            f"{mtp}.eh_proj.weight": self.eh_proj.weight,
            f"{mtp}.shared_head.norm.weight": self.head_norm.weight,
            f"{mtp}.shared_head.head.weight": weights["lm_head.weight"],
            f"{mtp}.embed_tokens.weight": weights["model.embed_tokens.weight"],
        }
        return {name: tensor.detach().float().cpu().clone() for name, tensor in weights.items()}

    def load_named_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes weights under their R1 names back in: the inverse of `named_weights`."""
        state: dict[str, torch.Tensor] = {}
        experts = range(self.config["n_routed_experts"])
        for name in self.model.state_dict():
            prefix, _, part = name.rpartition(".")
            if part == "gate_up_proj":
                pairs = [[weights[f"{prefix}.{e}.{kind}_proj.weight"] for kind in ("gate", "up")] for e in experts]
                state[name] = torch.stack([torch.cat(pair) for pair in pairs])
            elif part == "down_proj" and prefix.endswith("experts"):
                state[name] = torch.stack([weights[f"{prefix}.{e}.down_proj.weight"] for e in experts])
            else:
                state[name] = weights[name]
        self.model.load_state_dict(state)
        own = {"enorm": self.enorm, "hnorm": self.hnorm, "eh_proj": self.eh_proj, "shared_head.norm": self.head_norm}
        for name, module in own.items():
            module.load_state_dict({"weight": weights[f"model.layers.{self.num_layers}.{name}.weight"]})


def _cross_entropy(logits_NTV: torch.Tensor, targets_NT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_NTV.flatten(0, 1).float(), targets_NT.flatten())
