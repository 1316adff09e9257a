"""DeepSeek-V3.2, V3.2-Exp and V3.2-Speciale: DeepSeek-V3's network with sparse attention."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from dsquant.model.families import deepseek_v3, indexer, mla, mlps
from dsquant.model.families.family import Config, Family, ReadKey, SparseAttention
from dsquant.model.structure import DecoderLayer

_DENSE = deepseek_v3.DEEPSEEK_V3


def decoder_layer(config: Config, index: int) -> DecoderLayer:
    """Layer `index`; the multi-token-prediction layer behind the last one is built the same way."""
    prefix, dense = f"model.layers.{index}", deepseek_v3.decoder_layer(config, index)
    if not indexer.is_own(config, index):
        return dense
    attention = indexer.with_followers(prefix, dense.attention)
    return replace(dense, attention=attention)


def refusing(rotates_neighbours: bool) -> Any:
    """What a family refuses whose indexer rotates neighbouring dimensions, or halves."""

    def refuse(config: Config) -> str | None:
        if config.get("q_lora_rank") is None:
            return "config.json lacks q_lora_rank"
        stated = config.get("indexer_rope_interleave")
        if stated not in (None, rotates_neighbours):
            return f"indexer_rope_interleave {stated!r:.40} is not this architecture's ({rotates_neighbours})"
        # head_dim is read by nobody: transformers puts the rotated width there.
        of_network = deepseek_v3.network_problem({**config, "head_dim": None})
        return of_network or mlps.layer_types_problem(config) or indexer.problem(config)

    return refuse


def _gguf_config(key: ReadKey, tensors: Collection[str]) -> dict[str, Any]:
    return _DENSE.gguf.config(key, tensors) | indexer.config_of(key)


def _gguf_problems(config: Config) -> Iterator[str]:
    yield from mla.gguf_problems(config)
    yield from mlps.mixture_problems(config)
    yield from indexer.gguf_problems(config)


DEEPSEEK_V32: Family = replace(
    _DENSE,
    architecture="DeepseekV32ForCausalLM",
    releases="DeepSeek-V3.2, V3.2-Exp, V3.2-Speciale (FP8 or BF16)",
    config_class="DeepseekV32Config",
    model_types=("deepseek_v32",),
    layer=decoder_layer,
    sparse=SparseAttention(rotates_neighbours=False),
    gguf=replace(
        _DENSE.gguf,
        architecture="deepseek32",
        modules={**_DENSE.gguf.modules, **indexer.NAMES},
        keys=lambda config: _DENSE.gguf.keys(config) | indexer.keys(config),
        config=_gguf_config,
        biases=indexer.BIASES,
        problems=_gguf_problems,
    ),
    states=("indexer_rope_interleave",),
    network_keys=(*_DENSE.network_keys, *indexer.NETWORK_KEYS),
    in_fp8=indexer.IN_FP8,
    refuse=refusing(rotates_neighbours=False),
)
