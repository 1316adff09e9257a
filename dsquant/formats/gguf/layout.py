"""The places of a checkpoint's parameters in a GGUF file: names and shapes as llama.cpp reads them.

The network is the same; only the storage differs: a layer's experts are merged into one three-dimensional tensor, MLA's
kv_b_proj is split into keys (transposed, so that queries are absorbed) and values, and Llama's queries and keys have
their rotary halves interleaved. Each architecture's family states which of these it has (`GgufFacts`).

Shape legend: O out features, I in features, H heads, N rows of a head's keys without position, V of its values, L
latent width, E experts.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from dsquant.model.families import FAMILIES, architecture_of, sizes_of
from dsquant.model.structure import ROUTER_BIAS

_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias|" + ROUTER_BIAS + ")")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")

Transform = Literal["same", "keys", "values", "rotary"]


@dataclass(frozen=True)
class Placement:
    """A part of a GGUF file that a parameter fills."""

    tensor: str
    transform: Transform = "same"
    """same; keys or values: that part of kv_b_proj; rotary: rows of each head interleaved."""
    expert: int | None = None
    """The expert whose part of a merged tensor it is."""


@cache
def placements(parameter: str, architecture: str) -> tuple[Placement, ...]:
    """Returns the place of a parameter: one, or two for kv_b_proj; none where a GGUF file has no such tensor."""
    if parameter in _OUTSIDE_LAYERS:
        return (Placement(_OUTSIDE_LAYERS[parameter]),)
    match, family = _LAYER.fullmatch(parameter), FAMILIES.get(architecture)
    if match is None or family is None:
        return ()
    facts, block, module, kind = family.gguf, f"blk.{match[1]}", match[2], match[3]
    if kind == ROUTER_BIAS:
        return (Placement(f"{block}.exp_probs_b.bias"),)
    if facts.split is not None and module == facts.split.module:
        keys, values = (f"{block}.{part}.weight" for part in (facts.split.keys, facts.split.values))
        return Placement(keys, "keys"), Placement(values, "values")
    expert = _EXPERT.fullmatch(module)
    if expert is not None:
        return (Placement(f"{block}.ffn_{expert[2]}_exps.weight", expert=int(expert[1])),)
    if module not in facts.modules or (kind == "bias" and module not in facts.biases):
        return ()
    transform: Transform = "rotary" if module in facts.interleaved else "same"
    return (Placement(f"{block}.{facts.modules[module]}.{kind}", transform),)


def parameters(tensor: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of the parameters that a GGUF tensor of a shape (columns last) holds: the reverse of
    `placements`.

    None for tensors that are computed or unknown; kv_b_proj comes with its keys.
    """
    outside = {stored: name for name, stored in _OUTSIDE_LAYERS.items()}
    if tensor in outside:
        yield outside[tensor], shape
    match = _BLOCK.fullmatch(tensor)
    if match is None:
        return
    prefix, part, kind = f"model.layers.{match[1]}", match[2], match[3]
    facts = FAMILIES[architecture_of(config)].gguf
    modules = {stored: module for module, stored in facts.modules.items()}
    if part == "exp_probs_b":
        yield f"{prefix}.mlp.gate.{ROUTER_BIAS}", shape
    elif facts.split is not None and part == facts.split.keys:
        heads, keys, values, columns = facts.split.shape(config)
        yield f"{prefix}.{facts.split.module}.weight", (heads * (keys + values), columns)
    elif part.endswith("_exps"):
        projection = part.removeprefix("ffn_").removesuffix("_exps")
        for expert in range(shape[0]):
            yield f"{prefix}.mlp.experts.{expert}.{projection}_proj.{kind}", shape[1:]
    elif part in modules:
        yield f"{prefix}.{modules[part]}.{kind}", shape


def stored_shape(shape: tuple[int, ...], placement: Placement, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the shape of the GGUF tensor that a parameter of some shape fills, columns last: [O, I], [E, O, I], [H,
    L, N] for keys, [H, V, L] for values, or the parameter's own shape."""
    if placement.expert is not None:
        return (sizes_of(config).num_experts, *shape)
    if placement.transform in ("keys", "values"):
        heads, keys, values = _heads(config)
        return (heads, shape[1], keys) if placement.transform == "keys" else (heads, values, shape[1])
    return shape


def encode(weight: torch.Tensor, parameter: str, transform: Transform, config: Mapping[str, Any]) -> torch.Tensor:
    """Transforms a whole parameter as its placement requires: [H, L, N], [H, V, L] or the parameter's shape."""
    if transform == "same":
        return weight
    if transform == "rotary":
        heads = _rotary_heads(parameter, config)
        return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
    heads, keys, _ = _heads(config)
    by_head = weight.unflatten(0, (heads, -1))
    return by_head[:, :keys].transpose(1, 2).contiguous() if transform == "keys" else by_head[:, keys:].contiguous()


def decode_rotary(weight: torch.Tensor, parameter: str, config: Mapping[str, Any]) -> torch.Tensor:
    """Undoes the `rotary` transform."""
    heads = _rotary_heads(parameter, config)
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def join_keys_and_values(keys_HLN: torch.Tensor, values_HVL: torch.Tensor) -> torch.Tensor:
    """Joins kv_b_proj's weight [H * (N + V), L] from its two parts."""
    return torch.cat([keys_HLN.transpose(1, 2), values_HVL], dim=1).flatten(0, 1)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns the heads of a split linear, and the rows of keys and of values of each."""
    split = FAMILIES[architecture_of(config)].gguf.split
    assert split is not None
    return split.shape(config)[:3]


def _rotary_heads(parameter: str, config: Mapping[str, Any]) -> int:
    heads = int(config["num_attention_heads"])
    return heads if ".q_proj." in parameter else int(config.get("num_key_value_heads") or heads)
