"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder: grouped-query attention and routed experts without a shared one.

Experts are chosen by softmax; queries and keys have norms.
"""

from collections.abc import Collection, Iterator
from typing import Any

from dsquant.model.families import gqa, mlps
from dsquant.model.families.family import NORMS, Config, Family, GgufFacts, MixtureKeys, ReadKey
from dsquant.model.structure import ROUTER, DecoderLayer

KEYS = MixtureKeys(num_experts="num_experts", num_shared_experts="", num_dense_layers="")
# Every release has these; where one is left out, engines assume different things.
NEEDED = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "norm_topk_prob")
# What makes some layers dense; no release has such.
EVERY_LAYER = {"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)}


def decoder_layer(config: Config, index: int) -> DecoderLayer:
    """Layer `index`."""
    prefix = f"model.layers.{index}"
    return mlps.layer_of(index, gqa.groups(prefix, config), mlps.mixture(prefix, config, index, KEYS))


def _refuse(config: Config) -> str | None:
    missing = [name for name in NEEDED if config.get(name) is None]
    if missing:
        return f"config.json lacks {', '.join(missing)}"
    if config.get("use_sliding_window"):
        return "sliding-window attention is not supported (no Qwen3 mixture uses it)"
    for key, every in EVERY_LAYER.items():
        if config.get(key) not in every:
            return f"{key} {config[key]!r:.80} is not supported: every layer of a Qwen3 mixture has experts"
    return mlps.routing_problem(config, KEYS)


def _gguf_config(key: ReadKey, _: Collection[str]) -> dict[str, Any]:
    return gqa.config_of(key) | mlps.numbers_of(key, KEYS) | {"norm_topk_prob": True}


def _gguf_problems(config: Config) -> Iterator[str]:
    if not config["norm_topk_prob"]:
        yield "norm_topk_prob false: llama.cpp's qwen3moe lets the shares of the chosen experts sum to 1"
    yield from mlps.count_problems(config, KEYS)


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    releases="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    config_class="Qwen3MoeConfig",
    model_types=("qwen3_moe",),
    layer=decoder_layer,
    cache=gqa.cache,
    mixture=KEYS,
    gguf=GgufFacts(
        architecture="qwen3moe",
        modules={**NORMS, **gqa.NAMES, **gqa.HEAD_NORM_NAMES, ROUTER: "ffn_gate_inp"},
        keys=lambda config: gqa.keys(config) | mlps.numbers(config, KEYS),
        config=_gguf_config,
        problems=_gguf_problems,
    ),
    renamed={"num_local_experts": "num_experts"},
    network_keys=("norm_topk_prob",),
    fused_experts=mlps.FUSED,
    refuse=_refuse,
)
