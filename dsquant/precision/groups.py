"""What a target for size or bits leaves to choose: groups of tensors, and what each takes at every width.

A width is bits of a code, or a type of GGUF. Engines fuse linears, and want one scheme for what they fuse: vLLM and
SGLang q_a_proj with kv_a_proj_with_mqa, q_proj with k_proj and v_proj, gate_proj with up_proj, and all routed experts
of a layer. A group never divides these.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from dsquant.errors import UsageError
from dsquant.formats.protocol import Format
from dsquant.model.structure import DecoderLayer
from dsquant.precision.allocation import Width
from dsquant.recipes import Recipe, TargetedRecipe, format_size
from dsquant.schemes import UNQUANTIZED, Grid
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.shards import tensor_bytes

# What `width_rows` tells.
WIDTH_COLUMNS = ("group", "stored as", "layers", "size", "of the error")
# A group's name: its layer, and what it is in every layer.
_GROUP = re.compile(r"(?:model\.layers|blk)\.(\d+)\.(.+?)(?:\.weight)?")
# What vLLM's and SGLang's kernels take; other widths are chosen only where a target cannot be met without them.
STOCK_WIDTHS = (4, 8, UNQUANTIZED)


@dataclass(frozen=True)
class TensorGroup(Generic[Width]):
    """Linears of a layer that get one width."""

    name: str
    layer: int
    linears: tuple[str, ...]
    num_bytes: Mapping[Width, int]
    """Width -> stored bytes of all of them, with scales and zero points."""


@dataclass(frozen=True)
class MixedPlan(Generic[Width]):
    """What a target leaves to choose."""

    groups: tuple[TensorGroup[Width], ...]
    widths: tuple[Width, ...]
    """What groups may get: bits of a code, 16 is unquantized; or types."""
    budget_bytes: int
    """For all groups together."""
    other_bytes: int
    """Of all tensors that are in no group."""

    @property
    def total_bytes(self) -> int:
        """What the output's tensors take at the most."""
        return self.budget_bytes + self.other_bytes


def linear_groups(layer: DecoderLayer, quantized: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The groups of a layer's linears.

    Attention's are those that read one input, since they share their scales; an MLP is one group, since it is judged
    as a whole; a layer's routed experts are one.

    Args:
        layer: the layer.
        quantized: the linears that its preset quantizes.

    Returns:
        Name -> linears.
    """
    found = {f"{group.consumers[0]}": group.consumers for group in layer.attention}
    found |= {mlp.up.rsplit(".", 1)[0]: mlp.linears for mlp in layer.mlps if mlp.expert is None}
    if layer.experts:
        prefix = layer.experts[0].up.rsplit(".", 2)[0]
        found[prefix] = tuple(linear for mlp in layer.experts for linear in mlp.linears)
    return {name: linears for name, linears in found.items() if quantized and set(linears) <= set(quantized)}


def plan_mixed(
    recipe: Recipe,
    output_format: Format,
    grid: Grid,
    layers: Sequence[DecoderLayer],
    linears: frozenset[str],
    checkpoint: Checkpoint,
    dtypes: Mapping[str, str],
    kept_parameters: Sequence[str],
) -> MixedPlan[int]:
    """Works out what a target leaves to choose, from headers alone.

    Args:
        recipe: the run's recipe, with a target.
        output_format: the format.
        grid: the grid that scales are searched for.
        layers: the layers that are quantized.
        linears: the linears that the preset quantizes.
        checkpoint: the source.
        dtypes: parameter -> safetensors dtype where it is not quantized.
        kept_parameters: every parameter of the output.

    Returns:
        The groups, their sizes, and the bytes that they may take.

    Raises:
        UsageError: where no choice of widths meets the target, with the range that can be met.
    """
    shapes = {linear: checkpoint.weights.shape(f"{linear}.weight") for linear in linears}

    def size(linear: str, width: int) -> int:
        rows, columns = shapes[linear]
        if width == UNQUANTIZED:
            return tensor_bytes(dtypes[f"{linear}.weight"], (rows, columns))
        stored = output_format.stored(linear, (rows, columns), grid.with_bits(width))
        return sum(tensor.num_bytes for tensor in stored)

    def groups_of(widths: Sequence[int]) -> tuple[TensorGroup[int], ...]:
        return tuple(
            TensorGroup(name, layer.index, inside, {w: sum(size(one, w) for one in inside) for w in widths})
            for layer in layers
            for name, inside in linear_groups(layer, linears).items()
        )

    rest = [name for name in kept_parameters if name.removesuffix(".weight") not in linears]
    others = sum(tensor_bytes(dtypes[name], checkpoint.weights.shape(name)) for name in rest)
    elements = sum(math.prod(shape) for shape in shapes.values())
    groups = groups_of(output_format.widths)
    widths = ", ".join(f"{width} bits" for width in output_format.widths if width != UNQUANTIZED)
    what = f"{output_format.name} with {widths} or BF16 for what preset {recipe.preset} quantizes"
    budget = budget_bytes(recipe, groups, elements, others, what)
    stock = tuple(width for width in output_format.widths if width in STOCK_WIDTHS)
    if sum(min(group.num_bytes[width] for width in stock) for group in groups) <= budget:
        return MixedPlan(groups_of(stock), stock, budget, others)
    return MixedPlan(groups, output_format.widths, budget, others)


def budget_bytes(
    recipe: TargetedRecipe,
    groups: Sequence[TensorGroup[Width]],
    elements: int,
    other_bytes: int,
    what: str,
    fixed_bytes: int = 0,
) -> int:
    """What all groups together may take.

    Args:
        recipe: has the target.
        groups: the groups.
        elements: weights that the mean of the bits is over.
        other_bytes: of all tensors in no group.
        what: what is chosen, in words.
        fixed_bytes: of those in no group whose weights are among `elements`.

    Returns:
        Bytes.

    Raises:
        UsageError: where no choice of widths meets the target, with the range that can be met.
    """
    smallest, largest = (sum(pick(group.num_bytes.values()) for group in groups) for pick in (min, max))
    if recipe.target_size is not None:
        budget = recipe.target_size - other_bytes
        least, most = smallest + other_bytes, largest + other_bytes
        possible = f"from {least} to {most} bytes ({format_size(least)} to {format_size(most)})"
    else:
        assert recipe.target_bits is not None
        budget = int(recipe.target_bits * elements / 8) - fixed_bytes
        lowest, highest = (80000 * (size + fixed_bytes) / elements for size in (smallest, largest))
        possible = f"from {math.ceil(lowest) / 10000} to {math.floor(highest) / 10000} bits"
    if not smallest <= budget <= largest:
        raise UsageError(f"{recipe.target}: {what} gives {possible}; ask for something between")
    return budget


def width_rows(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The chosen widths for people: one row for each kind of group and width, with the layers that have it.

    Args:
        groups: group -> its width, stored bytes and error, as the record tells them.

    Returns:
        Kind, bits or type, layers, size and share of the summed error; all together in the last row.
    """
    total = sum(entry["error"] for entry in groups.values()) or 1.0
    found: dict[tuple[str, int | str], list[tuple[int, Mapping[str, Any]]]] = {}
    for name, entry in groups.items():
        match = _GROUP.fullmatch(name)
        assert match is not None, name
        found.setdefault((match[2], entry["width"]), []).append((int(match[1]), entry))
    rows = [(kind, _width_words(width), entries) for (kind, width), entries in sorted(found.items())]
    everything = sorted((entry for _, _, entries in rows for entry in entries), key=lambda entry: entry[0])
    return [
        (
            kind,
            words,
            _ranges(sorted({layer for layer, _ in entries})),
            format_size(sum(entry["bytes"] for _, entry in entries)),
            f"{sum(entry['error'] for _, entry in entries) / total:.1%}",
        )
        for kind, words, entries in [*rows, ("all of these", "", everything)]
    ]


def _width_words(width: int | str) -> str:
    if isinstance(width, str):
        return width
    return "BF16" if width == UNQUANTIZED else f"{width} bits"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
