"""The dense families of the R1 distills: Llama, Qwen2 and Qwen3."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dsquant.model.families import gqa, mlps
from dsquant.model.families.family import NORMS, Config, Family, GgufFacts, ReadKey
from dsquant.model.structure import DecoderLayer


def decoder_layer(config: Config, index: int) -> DecoderLayer:
    """Layer `index`."""
    prefix = f"model.layers.{index}"
    return mlps.layer_of(index, gqa.groups(prefix, config), (mlps.dense(prefix),))


def _refuse(config: Config) -> str | None:
    if config.get("use_sliding_window"):
        return "sliding-window attention is not supported (no R1 distill uses it)"
    if config.get("mlp_bias"):
        return "MLPs with biases are not supported (no R1 distill has them)"
    return None


def _refuse_llama(config: Config) -> str | None:
    # Qwen's configs state a window beside `use_sliding_window: false`; Llama's state none unless they mean one.
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window") is not False:
        return f"sliding_window {window!r:.80}: sliding-window attention is not supported (no R1 distill uses it)"
    return _refuse(config)


def _qwen2_problems(config: Config) -> Iterator[str]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if heads * config["head_dim"] != hidden:
        yield f"{heads} heads of {config['head_dim']}: llama.cpp's qwen2 wants hidden_size {hidden} divided among them"


def _gguf(architecture: str, modules: Mapping[str, str] = gqa.NAMES, **more: Any) -> GgufFacts:
    facts: dict[str, Any] = {"config": gqa.config_of, "biases": gqa.PROJECTIONS} | more
    return GgufFacts(architecture, {**NORMS, **modules, **mlps.NAMES}, gqa.keys, **facts)


def _llama_config(key: ReadKey, tensors: Collection[str]) -> dict[str, Any]:
    return gqa.config_of(key) | {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _family(name: str, releases: str, gguf: GgufFacts, refuse: Callable[[Config], str | None] = _refuse) -> Family:
    return Family(
        architecture=f"{name}ForCausalLM",
        releases=releases,
        config_class=f"{name}Config",
        model_types=(name.lower(),),
        layer=decoder_layer,
        cache=gqa.cache,
        gguf=gguf,
        refuse=refuse,
    )


LLAMA = _family(
    "Llama",
    "R1-Distill-Llama, other dense Llamas",
    _gguf(
        "llama",
        config=_llama_config,
        biases=(*gqa.PROJECTIONS, "self_attn.o_proj"),
        rope_scalings=("default", "linear", "yarn", "llama3"),
        interleaved=gqa.PROJECTIONS[:2],
    ),
    _refuse_llama,
)
QWEN2 = _family("Qwen2", "R1-Distill-Qwen, Qwen2.5", _gguf("qwen2", problems=_qwen2_problems))
QWEN3 = _family("Qwen3", "R1-0528-Qwen3-8B, dense Qwen3", _gguf("qwen3", gqa.NAMES | gqa.HEAD_NORM_NAMES))
