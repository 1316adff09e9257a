"""What a target for size or bits leaves to choose in a GGUF model: the tensors of the decoder, one type for each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from dsquant.errors import UsageError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.store import is_available
from dsquant.formats.gguf.target import places_of
from dsquant.formats.gguf.types import BLOCKS, CANDIDATES, FLOAT_TYPES, fitting_type, parse_overrides
from dsquant.model.structure import DecoderLayer
from dsquant.precision.groups import MixedPlan, TensorGroup, budget_bytes
from dsquant.recipes import GgufRecipe
from dsquant.source.checkpoint import Checkpoint


def plan_types(
    recipe: GgufRecipe, checkpoint: Checkpoint, layers: Sequence[DecoderLayer], tensors: Mapping[str, GgufTensor]
) -> MixedPlan[str] | None:
    """Works out what a target leaves to choose, from headers alone.

    Args:
        recipe: the conversion.
        checkpoint: the source.
        layers: the decoder's.
        tensors: every tensor, with the type that it gets without a target.

    Returns:
        The tensors to choose for, their sizes in each type, and the bytes that they may take; None without a target.

    Raises:
        UsageError: where no choice of types meets the target, with the range that can be met; where there is no
            calibration to choose by.
    """
    if recipe.target is None:
        return None
    if not recipe.texts:
        raise UsageError(
            f"{recipe.target}: types are chosen by what they do to the hidden states of calibration texts; give "
            "--calibration, and no --imatrix"
        )
    groups = tuple(
        TensorGroup(name, layer.index, linears, {chosen: replace(tensors[name], type_name=chosen).num_bytes
                                                 for chosen in candidates})
        for layer in layers
        for name, linears in _linears_of(checkpoint, layer).items()
        if len(candidates := _candidates(recipe, tensors[name])) > 1
    )  # fmt: skip
    if not groups:
        raise UsageError(f"{recipe.target}: --tensor-type leaves no tensor to choose a type for")
    names = {group.name for group in groups}
    others = sum(tensor.num_bytes for name, tensor in tensors.items() if name not in names)
    decoder = {name for layer in layers for name in _linears_of(checkpoint, layer)}
    elements = sum(prod(tensors[name].shape) for name in decoder)
    fixed = sum(tensors[name].num_bytes for name in decoder - names)
    types = tuple(sorted({chosen for group in groups for chosen in group.num_bytes}, key=_bits_and_name))
    what = f"one of {', '.join(types)} for each of {len(groups)} tensors"
    return MixedPlan(groups, types, budget_bytes(recipe, groups, elements, others, what, fixed), others)


def _bits_and_name(type_name: str) -> tuple[float, str]:
    weights, size = BLOCKS[type_name]
    return 8 * size / weights, type_name


def _linears_of(checkpoint: Checkpoint, layer: DecoderLayer) -> dict[str, tuple[str, ...]]:
    """GGUF tensor -> the layer's linears that fill it."""
    found: dict[str, tuple[str, ...]] = {}
    for linear in layer.linears:
        for placement in places_of(checkpoint, f"{linear}.weight"):
            found[placement.tensor] = (*found.get(placement.tensor, ()), linear)
    return found


def _candidates(recipe: GgufRecipe, tensor: GgufTensor) -> tuple[str, ...]:
    """The types that a tensor may get; none where an override says it."""
    if any(pattern.search(tensor.name) for pattern, _ in parse_overrides(recipe.tensor_types)):
        return ()
    types = dict.fromkeys(fitting_type(wanted, tensor.shape[-1]) for wanted in CANDIDATES)
    return tuple(name for name in types if name not in FLOAT_TYPES and is_available(name))
