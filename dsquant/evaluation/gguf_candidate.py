"""Checks that a GGUF file holds the network of a reference: every number that llama.cpp reads, every tensor's shape.

A candidate's weights are run through the reference's network, so a file that describes another one is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from dsquant.errors import InputError
from dsquant.formats.gguf.gguf_checkpoint import GgufHeader
from dsquant.formats.gguf.layout import placements, stored_shape
from dsquant.formats.gguf.loader import number_problem
from dsquant.formats.gguf.metadata import model_keys
from dsquant.formats.gguf.rope import FACTORED
from dsquant.formats.gguf.types import scale_beside
from dsquant.model.families import FAMILIES, architecture_of
from dsquant.model.families.family import GgufFacts
from dsquant.model.rotary import Rotary
from dsquant.source.weights import Weights

# Keys without effect on a weight: the longest context, and what tensors show (layers and tokens are compared
# separately).
_OTHER_KEYS = (
    "block_count", "context_length", "vocab_size", "expert_group_count", "expert_group_used_count",
    "attention.indexer.types",
)  # fmt: skip
# Keys that llama.cpp reads and no network of these families has, with the values that change nothing.
_NEUTRAL = {"attention.causal": (True,), "attention.temperature_scale": (0.0,)}
_TOKENS = "tokenizer.ggml.tokens"


def check_same_network(header: GgufHeader, reference: str, config: Mapping[str, Any], rotary: Rotary) -> None:
    """Refuses a file of the reference's architecture whose keys describe another network.

    `reference` is the reference's path, for messages; `config` its network with transformers' defaults filled in.
    Raises InputError with key, expected and found value.
    """
    facts, found = _facts(config), _with_defaults(header.numbers)
    problem = number_problem(facts, config)
    if problem:
        raise InputError(f"{header.file}: it cannot be {reference}: {problem}")
    wanted = model_keys(facts, config, rotary)
    pairs = [(key, value, found.get(key)) for key, value in wanted.items() if not _elsewhere(key)]
    pairs.append(("block_count", wanted["block_count"], found["block_count"]))
    if "expert_count" in wanted:
        groups = _groups(wanted)
        pairs += [(key, groups[key], _groups(found)[key]) for key in groups]
    pairs += [
        (key, values[0], found[key]) for key, values in _NEUTRAL.items() if found.get(key, values[0]) not in values
    ]
    for key, value, other in pairs:
        if not _same(value, other):
            raise InputError(_difference(header, key, value, other, reference))
    _check_rotary(header, reference, config, wanted, rotary)
    tokens, rows = header.keys.get(_TOKENS), header.num_tokens
    if tokens is not None and len(tokens) != rows:
        raise InputError(
            f"{header.file}: key {_TOKENS!r} has {len(tokens)} tokens, 'token_embd.weight' {rows} rows; llama.cpp does "
            "not load it"
        )


def check_same_tensors(header: GgufHeader, reference: str, config: Mapping[str, Any], weights: Weights) -> None:
    """Refuses a file with tensors that the reference's network does not use, or of other shapes, with InputError."""
    wanted = {
        place.tensor: stored_shape(weights.shape(name), place, config)
        for name in weights
        for place in placements(name, header.architecture)
    }
    if config["tie_word_embeddings"]:
        wanted.pop("output.weight", None)
    if FACTORED in _facts(config).rope_scalings:
        wanted["rope_freqs.weight"] = (config["head_dim"] // 2,)
    stored = {name: header.tensors[name].tensor_type.name for name in wanted if name in header.tensors}
    scales = {name: scale_beside(name, type_name) for name, type_name in stored.items()}
    wanted |= {scale: wanted[name][:-2] or (1,) for name, scale in scales.items() if scale}
    layers, num_mtp = config["num_hidden_layers"], int(header.numbers.get("nextn_predict_layers", 0))
    for name, tensor in header.tensors.items():
        if name not in wanted and not layers <= _layer(name) < layers + num_mtp:
            raise InputError(
                f"{header.file}: tensor {name!r} is not part of the network of {reference}, but llama.cpp would "
                "use it; not the same model"
            )
        found = tuple(int(extent) for extent in tensor.shape[::-1])
        if found != wanted.get(name, found):
            raise InputError(
                f"{header.file}: tensor {name!r} has shape {list(found)}, the network of {reference} needs "
                f"{list(wanted[name])}; not the same model"
            )


def _facts(config: Mapping[str, Any]) -> GgufFacts:
    """Those of the reference's architecture: several may share a name in GGUF."""
    return FAMILIES[architecture_of(config)].gguf


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _elsewhere(key: str) -> bool:
    return key in _OTHER_KEYS or key.startswith("rope.")


def _with_defaults(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a file's keys, with llama.cpp's defaults where one is missing."""
    found = dict(numbers)
    heads, hidden = found.get("attention.head_count"), found.get("embedding_length")
    found.setdefault("attention.head_count_kv", heads)
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        found.setdefault("attention.key_length", hidden // heads)
        found.setdefault("attention.value_length", hidden // heads)
    found.setdefault("leading_dense_block_count", 0)
    found.setdefault("expert_weights_norm", False)
    found["expert_weights_scale"] = found.get("expert_weights_scale") or 1.0
    layers, mtp = found.get("block_count"), found.get("nextn_predict_layers", 0)
    found["block_count"] = layers - mtp if isinstance(layers, int) and isinstance(mtp, int) else layers
    return found


def _groups(keys: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of expert groups and how many of them are kept: one of one where all are."""
    count, kept = keys.get("expert_group_count") or 1, keys.get("expert_group_used_count") or 1
    count, kept = (count, kept) if count > 1 and kept < count else (1, 1)
    return {"expert_group_count": count, "expert_group_used_count": kept}


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(wanted, found, rel_tol=1e-5)  # stored in single precision
    return bool(wanted == found)


def _check_rotary(
    header: GgufHeader, reference: str, config: Mapping[str, Any], wanted: Mapping[str, Any], rotary: Rotary
) -> None:
    facts = _facts(config)
    kind, known = config["rope_parameters"]["rope_type"], facts.rope_scalings
    if kind not in known:
        raise InputError(
            f"{header.file}: {reference} has rope scaling of type {kind!r}, which GGUF files of {facts.architecture} "
            f"do not have (only {', '.join(known)})"
        )
    difference = rotary.difference(header.rotary)
    if difference is None or rotary.difference(header.default_rotary) is None:
        return
    numbers = header.numbers
    keys = dict.fromkeys(key for key in (*wanted, *numbers) if key.startswith("rope."))
    key = next((key for key in keys if not _same(wanted.get(key), numbers.get(key))), None)
    if key is None:
        raise InputError(
            f"{header.file}: its rotary embedding is not that of {reference}: {difference}; not the same model"
        )
    text = _difference(header, key, wanted.get(key), numbers.get(key), reference)
    raise InputError(f"{text} ({difference})")


def _difference(header: GgufHeader, key: str, wanted: Any, found: Any, reference: str) -> str:
    name = f"{header.keys['general.architecture']}.{key}"
    return f"{header.file}: key {name!r} is {found!r}, the network of {reference} needs {wanted!r}; not the same model"
