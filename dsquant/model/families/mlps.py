"""Gated MLPs: a dense one in every layer, or routed experts beside a shared one behind a few dense layers."""

from collections.abc import Iterator
from typing import Any

from dsquant.model.families.family import Config, MixtureKeys, ReadKey
from dsquant.model.structure import ROUTER, Absorbed, DecoderLayer, Mlp, MlpKind, ScaleGroup, gates_and_ups

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
NETWORK_KEYS = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
# The tensors in which transformers may save a layer's experts -> the linears in each.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# The linear that engines make of several that read one input.
FUSED_BY_ENGINES = {"gate_up_proj": ("gate_proj", "up_proj")}
# MixtureKeys' fields -> key of a GGUF file.
_NUMBERS = {
    "num_dense_layers": "leading_dense_block_count",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "num_shared_experts": "expert_shared_count",
    "expert_width": "expert_feed_forward_length",
}


def dense(prefix: str) -> Mlp:
    """The only MLP of the layer whose module is `prefix`."""
    return _mlp("dense", f"{prefix}.mlp")


def mixture(prefix: str, config: Config, index: int, names: MixtureKeys = DEEPSEEK) -> tuple[Mlp, ...]:
    """A layer's MLPs: one before the first mixture; shared expert and routed ones in a mixture."""
    if names.num_dense_layers and index < config[names.num_dense_layers]:
        return (dense(prefix),)
    shared = (_mlp("shared", f"{prefix}.mlp.shared_experts"),) if names.num_shared_experts else ()
    experts = range(config[names.num_experts])
    return *shared, *(_mlp("routed", f"{prefix}.mlp.experts.{expert}", expert) for expert in experts)


def _mlp(kind: MlpKind, module: str, expert: int | None = None) -> Mlp:
    return Mlp(kind, f"{module}.gate_proj", f"{module}.up_proj", f"{module}.down_proj", expert)


def layer_of(
    index: int, attention: tuple[ScaleGroup, ...], mlps: tuple[Mlp, ...], absorbed: Absorbed | None = None
) -> DecoderLayer:
    """Puts a layer together: one norm feeds all its MLPs, and the router where some are routed.

    Args:
        index: number of the layer.
        attention: the scale groups inside attention, in the order of the data flow.
        mlps: the layer's.
        absorbed: of latent attention.

    Returns:
        The layer's structure.
    """
    prefix = f"model.layers.{index}"
    router = f"{prefix}.{ROUTER}.weight" if any(mlp.kind == "routed" for mlp in mlps) else None
    linears = tuple(name for group in attention for name in group.consumers)
    followers = () if router is None else (router,)
    norm = ScaleGroup(f"{prefix}.post_attention_layernorm", gates_and_ups(mlps), followers)
    return DecoderLayer(index, attention, linears, norm, router, mlps, absorbed)


def routing_problem(config: Config, names: MixtureKeys = DEEPSEEK) -> str | None:
    """What is wrong with the numbers that choose experts: no tensor's shape would show it."""
    if names.num_shared_experts and not config.get(names.num_shared_experts):
        return "a mixture without a shared expert is not supported"
    experts, chosen = config.get(names.num_experts), config.get(names.experts_per_token)
    groups, kept = config.get("n_group", 1), config.get("topk_group", 1)
    counts = (experts, groups, kept, chosen)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        keys = f"{names.num_experts}, n_group, topk_group, {names.experts_per_token}"
        return f"{keys} must be positive numbers, found {counts}"
    if experts % groups or kept > groups or chosen > experts // groups * kept:
        return (
            f"{chosen} of {experts} experts cannot be chosen from {kept} of {groups} groups "
            f"({names.experts_per_token}, {names.num_experts}, topk_group, n_group)"
        )
    if experts // groups < 2:  # a group is ranked by the sum of its two best scores
        return f"groups of one expert cannot be ranked ({names.num_experts} {experts}, n_group {groups})"
    return None


def layer_types_problem(config: Config, names: MixtureKeys = DEEPSEEK) -> str | None:
    """What is wrong with `mlp_layer_types`, in words: as transformers 5 writes them, the dense layers come first."""
    found, layers, dense = (config.get(key) for key in ("mlp_layer_types", "num_hidden_layers", names.num_dense_layers))
    if found is None or not (isinstance(layers, int) and isinstance(dense, int)):
        return None
    if found == ["dense"] * dense + ["sparse"] * (layers - dense):
        return None
    return f"mlp_layer_types {found!r:.80} are not {names.num_dense_layers} {dense} dense layers before sparse ones"


def _named(names: MixtureKeys) -> dict[str, str]:
    """Key of a GGUF file -> key of the config, of the numbers that a family has."""
    return {key: name for field, key in _NUMBERS.items() if (name := getattr(names, field))}


def numbers(config: Config, names: MixtureKeys) -> dict[str, Any]:
    """The numbers of experts and their width in a GGUF file: all that a mixture without DeepSeek's routing needs."""
    return {key: config[name] for key, name in _named(names).items()}


def numbers_of(key: ReadKey, names: MixtureKeys) -> dict[str, Any]:
    """The reverse of `numbers`: config.json's entries."""
    return {name: key(stored) for stored, name in _named(names).items()}


def mixture_keys(config: Config, names: MixtureKeys = DEEPSEEK) -> dict[str, Any]:
    """The mixtures' numbers in a GGUF file."""
    from gguf import ExpertGatingFuncType

    found = numbers(config, names) | {
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
    return numbers_of(key, names) | {
        "routed_scaling_factor": key("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(key("expert_weights_norm", False)),
        "n_group": key("expert_group_count", 1),
        "topk_group": key("expert_group_used_count", 1),
    }


def scoring(key: ReadKey, unstated: str) -> Any:
    """What a GGUF file says that experts are chosen by, in config.json's words; its number where there is no word.

    Args:
        key: reads the file's numbers.
        unstated: what llama.cpp takes where the file does not say it.

    Returns:
        The value of `scoring_func`.
    """
    from gguf import ExpertGatingFuncType

    number = key("expert_gating_func", 0)
    words = {0: unstated, ExpertGatingFuncType.SIGMOID: "sigmoid", ExpertGatingFuncType.SOFTMAX: "softmax"}
    return words.get(number, number)


def count_problems(config: Config, names: MixtureKeys) -> Iterator[str]:
    """Numbers of experts that llama.cpp does not load, in words."""
    experts = config[names.num_experts]
    if experts > LARGEST_EXPERTS:
        yield f"{names.num_experts} {experts}: llama.cpp loads up to {LARGEST_EXPERTS}"


def mixture_problems(config: Config, names: MixtureKeys = DEEPSEEK) -> Iterator[str]:
    """Numbers of mixtures that llama.cpp does not load or takes for others, in words."""
    yield from count_problems(config, names)
    if config["routed_scaling_factor"] == 0:
        yield "routed_scaling_factor 0: llama.cpp takes it for 1"
