"""The choice of types in GGUF for a target of bits or size: one for each tensor of the decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from dsquant.errors import UsageError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.store import is_available
from dsquant.formats.gguf.target import places_of
from dsquant.formats.gguf.types import CANDIDATES, FLOAT_TYPES, block_of, fitting_type, parse_overrides
from dsquant.formats.wanted import Choice, Choosable, Wanted
from dsquant.model.structure import DecoderLayer
from dsquant.source.checkpoint import Checkpoint


def type_choice(tensors: Mapping[str, GgufTensor], wanted: Wanted) -> Choice:
    """Returns the tensors of the decoder that no override is for, and their sizes in each type; raises UsageError where
    there are none."""
    recipe, checkpoint = wanted.recipe, wanted.checkpoint
    filled = {layer.index: _filled(checkpoint, layer) for layer in wanted.skeleton.layers[: wanted.skeleton.num_layers]}
    groups = tuple(
        Choosable(name, layer, linears, {one: replace(tensors[name], type_name=one).num_bytes for one in types})
        for layer, found in filled.items()
        for name, linears in found.items()
        if len(types := _candidates(recipe.tensor_types, tensors[name])) > 1
    )
    if not groups:
        raise UsageError(f"{recipe.target}: --tensor-type leaves no tensor to choose a type for")
    names = {group.name for group in groups}
    decoder = {name for found in filled.values() for name in found}
    everything = sorted({chosen for group in groups for chosen in group.num_bytes}, key=_bits_and_name)
    return Choice(
        groups,
        elements=sum(prod(tensors[name].shape) for name in decoder),
        other_bytes=sum(tensor.num_bytes for name, tensor in tensors.items() if name not in names),
        fixed_bytes=sum(tensors[name].num_bytes for name in decoder - names),
        words=f"one of {', '.join(everything)} for each of {len(groups)} tensors",
        widths=tuple(everything),
    )


def _bits_and_name(type_name: str) -> tuple[float, str]:
    weights, size = block_of(type_name)
    return 8 * size / weights, type_name


def _filled(checkpoint: Checkpoint, layer: DecoderLayer) -> dict[str, tuple[str, ...]]:
    """GGUF tensor -> the layer's linears that fill it."""
    found: dict[str, tuple[str, ...]] = {}
    for linear in layer.linears:
        for placement in places_of(checkpoint, f"{linear}.weight"):
            found[placement.tensor] = (*found.get(placement.tensor, ()), linear)
    return found


def _candidates(overrides: Sequence[str], tensor: GgufTensor) -> tuple[str, ...]:
    """Returns the types that a tensor may get; none where an override states its type."""
    if any(pattern.search(tensor.name) for pattern, _ in parse_overrides(overrides)):
        return ()
    types = dict.fromkeys(fitting_type(wanted, tensor.shape[-1]) for wanted in CANDIDATES)
    return tuple(name for name in types if name not in FLOAT_TYPES and is_available(name))
