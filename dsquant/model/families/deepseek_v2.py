"""DeepSeek-V2, V2-Lite, Coder-V2: DeepSeek-V3's layers with experts chosen by softmax, and no multi-token prediction.

`greedy` takes the best of all experts, `group_limited_greedy` those of the groups whose best expert is best; shares are
not normalized.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from dsquant.model.families import deepseek_v3, mla, mlps
from dsquant.model.families.family import Config, Family, ReadKey

_V3 = deepseek_v3.DEEPSEEK_V3
GREEDY, GROUPED = "greedy", "group_limited_greedy"
# What greedy routing leaves out.
_ONE_GROUP = {"n_group": 1, "topk_group": 1}


def _refuse(config: Config) -> str | None:
    method = config.get("topk_method", GREEDY)
    if config.get("scoring_func", "softmax") != "softmax" or method not in (GREEDY, GROUPED):
        return (
            f"routing by scoring_func={config.get('scoring_func')!r}, topk_method={method!r} is not DeepSeek-V2's "
            f"(softmax; {GREEDY} or {GROUPED})"
        )
    if config.get("norm_topk_prob"):
        return "norm_topk_prob true: no DeepSeek-V2 normalizes the shares of its experts, and transformers does not"
    routed = {**config, **deepseek_v3.ROUTING, **(_ONE_GROUP if method == GREEDY else {})}
    return deepseek_v3.network_problem({**routed, "head_dim": None})


def _keys(config: Config) -> dict[str, Any]:
    from gguf import ExpertGatingFuncType

    gating = {"expert_gating_func": int(ExpertGatingFuncType.SOFTMAX)}
    of_mixture = mlps.mixture_keys({**config, **_ONE_GROUP, "norm_topk_prob": False})
    return mla.keys(config) | of_mixture | gating


def _gguf_config(key: ReadKey, tensors: Collection[str]) -> dict[str, Any]:
    return _V3.gguf.config(key, tensors) | {"topk_method": GREEDY}


def _gguf_problems(config: Config) -> Iterator[str]:
    if config["topk_method"] == GROUPED and config["topk_group"] < config["n_group"]:
        yield f"topk_method {GROUPED}: llama.cpp ranks groups by their two best experts, DeepSeek-V2 by the best"
    yield from _V3.gguf.problems(config)


DEEPSEEK_V2: Family = replace(
    _V3,
    architecture="DeepseekV2ForCausalLM",
    releases="DeepSeek-V2, V2.5, V2-Lite, Coder-V2",
    config_class="DeepseekV2Config",
    model_types=("deepseek_v2",),
    gguf=replace(_V3.gguf, keys=_keys, config=_gguf_config, problems=_gguf_problems),
    mtp_key="",
    stated={"scoring_func": "softmax"},
    network_keys=(*mla.NETWORK_KEYS, *mlps.NETWORK_KEYS, "topk_method"),
    packed_types=(),
    refuse=_refuse,
)
