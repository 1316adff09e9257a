"""Gated MLPs: a dense one in every layer, or routed experts beside a shared one behind a few dense layers."""

from collections.abc import Iterator
from typing import Any

from dsquant.model.families.family import Config, MixtureKeys, ReadKey, Shapes

NAMES = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
MIXTURE_NAMES = NAMES | {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
LARGEST_EXPERTS = 1024  # of llama.cpp
DEEPSEEK = MixtureKeys()
# What configs say about mixtures beside MixtureKeys.
NETWORK_KEYS = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "scoring_func", "topk_method")
# MixtureKeys' fields -> key of a GGUF file.
_NUMBERS = {
    "num_dense_layers": "leading_dense_block_count",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "num_shared_experts": "expert_shared_count",
    "expert_width": "expert_feed_forward_length",
}


def gated_tensors(hidden: int, width: int, suffix: str = "") -> Shapes:
    """A gated MLP's weights in a GGUF block."""
    return {
        f"ffn_gate{suffix}.weight": (width, hidden),
        f"ffn_up{suffix}.weight": (width, hidden),
        f"ffn_down{suffix}.weight": (hidden, width),
    }


def tensors(config: Config) -> Shapes:
    """A dense MLP's weights in a GGUF block."""
    return gated_tensors(config["hidden_size"], config["intermediate_size"])


def mixture_tensors(config: Config, layer: int, names: MixtureKeys = DEEPSEEK) -> tuple[Shapes, Shapes]:
    """The weights of a layer's dense MLP, or of its mixture and the bias of its router, in a GGUF block."""
    hidden, width, experts = config["hidden_size"], config[names.expert_width], config[names.num_experts]
    if names.num_dense_layers and layer < config[names.num_dense_layers]:
        return tensors(config), {}
    routed: Shapes = {name: (experts, *shape) for name, shape in gated_tensors(hidden, width, "_exps").items()}
    if names.num_shared_experts:
        routed |= gated_tensors(hidden, width * config[names.num_shared_experts], "_shexp")
    return routed | {"ffn_gate_inp.weight": (experts, hidden)}, {"exp_probs_b.bias": (experts,)}


def _named(names: MixtureKeys) -> dict[str, str]:
    """Key of a GGUF file -> key of the config, of the numbers that a family has."""
    return {key: name for field, key in _NUMBERS.items() if (name := getattr(names, field))}


def mixture_keys(config: Config, names: MixtureKeys = DEEPSEEK) -> dict[str, Any]:
    """The mixtures' numbers in a GGUF file."""
    from gguf import ExpertGatingFuncType

    found = {key: config[name] for key, name in _named(names).items()} | {
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": int(ExpertGatingFuncType.SIGMOID),
    }
    if config["topk_group"] < config["n_group"]:  # where all groups are kept, llama.cpp wants no groups
        found |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return found


def mixture_config(key: ReadKey, names: MixtureKeys = DEEPSEEK) -> dict[str, Any]:
    """config.json's entries for mixtures, from a GGUF file's numbers; without groups llama.cpp chooses from all
    experts.
    """
    return {name: key(stored) for stored, name in _named(names).items()} | {
        "routed_scaling_factor": key("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(key("expert_weights_norm", False)),
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
    }


def scoring(key: ReadKey) -> Any:
    """What a GGUF file says that experts are chosen by, as config.json does; its number where that has no word."""
    from gguf import ExpertGatingFuncType

    number = key("expert_gating_func", 0)
    return {ExpertGatingFuncType.SIGMOID: "sigmoid", ExpertGatingFuncType.SOFTMAX: "softmax"}.get(number, number)


def mixture_problems(config: Config, names: MixtureKeys = DEEPSEEK) -> Iterator[str]:
    """Numbers of mixtures that llama.cpp does not load or takes for others, in words."""
    experts = config[names.num_experts]
    if experts > LARGEST_EXPERTS:
        yield f"{names.num_experts} {experts}: llama.cpp loads up to {LARGEST_EXPERTS}"
    if config["routed_scaling_factor"] == 0:
        yield "routed_scaling_factor 0: llama.cpp takes it for 1"
