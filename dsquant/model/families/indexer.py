"""The indexer of sparse attention (DeepSeek-V3.2, arXiv 2512.02556): it scores all earlier tokens for each query, and
attention sees the best.

Two of its linears read the layer's input and one the queries' latent: scales folded into these norms are folded into
them too. It is never quantized: vLLM builds it so, and what it chooses decides what attention sees.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from dsquant.model.families.family import Config, ReadKey
from dsquant.model.structure import ScaleGroup

MODULE = "self_attn.indexer"
NAMES = {
    f"{MODULE}.wq_b": "indexer.attn_q_b",
    f"{MODULE}.wk": "indexer.attn_k",
    f"{MODULE}.k_norm": "indexer.k_norm",
    f"{MODULE}.weights_proj": "indexer.proj",
}
BIASES = (f"{MODULE}.k_norm",)
# Those that FP8 releases store in FP8.
IN_FP8 = (f"{MODULE}.wq_b", f"{MODULE}.wk")
NETWORK_KEYS = ("index_topk", "index_head_dim", "index_n_heads")
# How layers come to what they attend to; a layer that shares takes what an earlier one has chosen.
TYPES_KEY, OWN, SHARED = "indexer_types", "full", "shared"
_NUMBERS = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}


def is_own(config: Config, index: int) -> bool:
    """Whether layer `index` has an indexer; multi-token-prediction layers do."""
    types = config.get(TYPES_KEY) or ()
    return index >= len(types) or types[index] == OWN


def with_followers(prefix: str, groups: tuple[ScaleGroup, ...]) -> tuple[ScaleGroup, ...]:
    """Latent attention's scale groups in a layer with an indexer; those of the layer's input and the queries' latent
    come first.
    """
    layer_input, latent, *others = groups
    reads_input = tuple(f"{prefix}.{MODULE}.{name}.weight" for name in ("wk", "weights_proj"))
    reads_latent = (f"{prefix}.{MODULE}.wq_b.weight",)
    return replace(layer_input, followers=reads_input), replace(latent, followers=reads_latent), *others


def problem(config: Config) -> str | None:
    """What is wrong with the numbers of an indexer, in words."""
    for key in NETWORK_KEYS:
        found = config.get(key, 1)
        if not isinstance(found, int) or found < 1:
            return f"{key} is {found!r:.40}, expected a positive number"
    types, layers = config.get(TYPES_KEY), config.get("num_hidden_layers")
    if types is None:
        return None
    known = isinstance(types, list) and all(one in (OWN, SHARED) for one in types)
    if not known or len(types) != layers or types[0] != OWN:
        return (
            f"{TYPES_KEY} {types!r:.80}: expected {OWN!r} or {SHARED!r} for each of {layers} layers, the first {OWN!r}"
        )
    return None


def keys(config: Config) -> dict[str, Any]:
    """The indexer's numbers in a GGUF file."""
    types = config.get(TYPES_KEY)
    found: dict[str, Any] = {stored: config[name] for stored, name in _NUMBERS.items()}
    return found | ({} if types is None else {"attention.indexer.types": [one == OWN for one in types]})


def config_of(key: ReadKey) -> dict[str, Any]:
    """config.json's entries, from a GGUF file's numbers."""
    return {name: key(stored) for stored, name in _NUMBERS.items()}


def types_of(tensors: Collection[str], num_layers: int) -> list[str]:
    """`indexer_types` by the tensors of a GGUF file."""
    return [OWN if f"blk.{index}.indexer.attn_k.weight" in tensors else SHARED for index in range(num_layers)]


def gguf_problems(config: Config) -> Iterator[str]:
    """What llama.cpp's indexer cannot compute, in words: it transforms heads by a Hadamard matrix."""
    width = config["index_head_dim"]
    if width & (width - 1):
        yield f"index_head_dim {width}: llama.cpp's indexer wants a power of two"
