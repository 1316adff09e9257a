"""The choice of types in GGUF for a target of bits or size: one for each tensor of the decoder, embedding and head.

The routed experts of a layer are one tensor for gate, one for up and one for down: no expert has a type of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from dsquant.errors import UsageError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.target import EMBEDDING, places_of
from dsquant.formats.gguf.types import (
    CANDIDATES,
    FLOAT_TYPES,
    NEED_IMPORTANCES,
    block_of,
    fitting_type,
    parse_overrides,
)
from dsquant.formats.wanted import Choice, Choosable, Wanted
from dsquant.model.streaming import head_name
from dsquant.source.checkpoint import Checkpoint

TYPES_FILE = "tensor-types.txt"
# Types with fewer bits than this share of a target's mean are tried only where it cannot be met without: of twelve
# types none such was chosen for means from 1.9 to 6 bits.
LEAST_SHARE = 0.65


def type_lines(tensors: Iterable[GgufTensor]) -> str:
    """Returns the types of all matrices that are quantized as `--tensor-type` of dsquant and `--tensor-type-file` of
    llama-quantize read them, one a line."""
    matrices = [one for one in tensors if len(one.shape) > 1 and one.type_name != "F32"]
    return "".join(f"^{re.escape(one.name)}$={one.type_name}\n" for one in matrices)


def type_choice(tensors: Mapping[str, GgufTensor], wanted: Wanted) -> Choice:
    """Returns the tensors of the decoder, embedding and head that no override is for, and their sizes in each type;
    raises UsageError where there are none."""
    recipe, checkpoint, skeleton = wanted.recipe, wanted.checkpoint, wanted.skeleton
    filled: dict[int | None, dict[str, tuple[str, ...]]] = {
        layer.index: _filled(checkpoint, layer.linears) for layer in skeleton.layers[: skeleton.num_layers]
    }
    decoder = {name for found in filled.values() for name in found}
    filled[None] = _filled(checkpoint, [name.removesuffix(".weight") for name in (EMBEDDING, head_name(skeleton))])
    overrides = [pattern for pattern, _ in parse_overrides(recipe.tensor_types)]
    groups = tuple(
        Choosable(name, layer, linears, {one: replace(tensors[name], type_name=one).num_bytes for one in types})
        for layer, found in filled.items()
        for name, linears in found.items()
        if len(types := _candidates(overrides, tensors[name], layer is None)) > 1
    )
    if not groups:
        raise UsageError(f"{recipe.target}: --tensor-type leaves no tensor to choose a type for")
    names = {group.name for group in groups}
    counted = names | decoder
    everything = sorted({chosen for group in groups for chosen in group.num_bytes}, key=_bits_and_name)
    elements = sum(prod(tensors[name].shape) for name in counted)
    other = sum(tensor.num_bytes for name, tensor in tensors.items() if name not in names)
    mean = recipe.target_bits or 8 * ((recipe.target_size or 0) - other) / elements
    return Choice(
        groups,
        elements=elements,
        other_bytes=other,
        fixed_bytes=sum(tensors[name].num_bytes for name in counted - names),
        words=f"one of {', '.join(everything)} for each of {len(groups)} tensors",
        widths=tuple(everything),
        preferred=tuple(one for one in everything if _bits_and_name(one)[0] >= LEAST_SHARE * mean),
    )


def _bits_and_name(type_name: str) -> tuple[float, str]:
    weights, size = block_of(type_name)
    return 8 * size / weights, type_name


def _filled(checkpoint: Checkpoint, linears: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """GGUF tensor -> the linears that fill it."""
    found: dict[str, tuple[str, ...]] = {}
    for linear in dict.fromkeys(linears):
        for placement in places_of(checkpoint, f"{linear}.weight"):
            found[placement.tensor] = (*found.get(placement.tensor, ()), linear)
    return found


def _candidates(overrides: Sequence[re.Pattern[str]], tensor: GgufTensor, outside: bool) -> tuple[str, ...]:
    """Returns the types that a tensor may get; none where an override states its type.

    Columns of what is `outside` of layers have no importances.
    """
    if any(pattern.search(tensor.name) for pattern in overrides):
        return ()
    wanted = [name for name in CANDIDATES if not outside or name not in NEED_IMPORTANCES]
    types = dict.fromkeys(fitting_type(name, tensor.shape[-1]) for name in wanted)
    return tuple(name for name in types if name not in FLOAT_TYPES)
