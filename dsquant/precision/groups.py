"""Groups the tensors that a target for size or bits leaves to choose, with the size of each at every width.

A width is bits of a code, or a type of GGUF. Engines fuse linears, and want one scheme for what they fuse: vLLM and
SGLang q_a_proj with kv_a_proj_with_mqa, q_proj with k_proj and v_proj, gate_proj with up_proj, and all routed experts
of a layer. A group never divides these.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsquant.errors import UsageError
from dsquant.formats.wanted import Choice, Choosable
from dsquant.options import format_size
from dsquant.recipes import Recipe
from dsquant.schemes import FP8_WIDTH, UNQUANTIZED

# What `width_rows` tells.
WIDTH_COLUMNS = ("group", "stored as", "layers", "size", "of the error")
# A group's name: its layer, and what it is in every layer.
_GROUP = re.compile(r"(?:(?:model\.layers|blk)\.(\d+)\.)?(.+?)(?:\.weight)?")


@dataclass(frozen=True)
class MixedPlan:
    """The choices that a target leaves."""

    groups: tuple[Choosable, ...]
    widths: tuple[Any, ...]
    """The widths that groups may get: bits of a code, 16 or `FP8` where it is not quantized; or types."""
    budget_bytes: int
    """For all groups together."""
    other_bytes: int
    """Of all tensors that are in no group."""

    @property
    def total_bytes(self) -> int:
        """The bytes that the output's tensors may take."""
        return self.budget_bytes + self.other_bytes


def plan_mixed(recipe: Recipe, choice: Choice) -> MixedPlan:
    """Works out, from headers alone, what a target leaves to choose of what the format offers.

    Raises UsageError where no choice of widths meets the target, with the range that can be met.
    """
    budget = _budget_bytes(recipe, choice)
    stock = tuple(width for width in choice.widths if width in choice.preferred)
    sizes = [{width: size for width, size in one.num_bytes.items() if width in stock} for one in choice.groups]
    if all(sizes) and sum(min(found.values()) for found in sizes) <= budget:
        groups = tuple(replace(group, num_bytes=found) for group, found in zip(choice.groups, sizes, strict=True))
        return MixedPlan(groups, stock, budget, choice.other_bytes)
    return MixedPlan(choice.groups, choice.widths, budget, choice.other_bytes)


def _budget_bytes(recipe: Recipe, choice: Choice) -> int:
    """Returns the bytes that all groups together may take."""
    smallest, largest = (sum(pick(group.num_bytes.values()) for group in choice.groups) for pick in (min, max))
    if recipe.target_size is not None:
        budget = recipe.target_size - choice.other_bytes
        least, most = smallest + choice.other_bytes, largest + choice.other_bytes
        possible = f"from {least} to {most} bytes ({format_size(least)} to {format_size(most)})"
    else:
        assert recipe.target_bits is not None
        budget = int(recipe.target_bits * choice.elements / 8) - choice.fixed_bytes
        lowest, highest = (80000 * (size + choice.fixed_bytes) / choice.elements for size in (smallest, largest))
        possible = f"from {math.ceil(lowest) / 10000} to {math.floor(highest) / 10000} bits"
    if FP8_WIDTH in choice.widths:
        budget = min(budget, largest)  # more bits than the release has gain nothing
    if not smallest <= budget <= largest:
        raise UsageError(f"{recipe.target}: {choice.words} gives {possible}; ask for something between")
    return budget


def by_output(precision: Mapping[str, Any], outputs: Collection[str]) -> Mapping[str, Mapping[str, Any]]:
    """Returns the chosen widths of a record by output; the record of a single one does not name it."""
    if not precision or len(outputs) > 1:
        return precision
    return dict.fromkeys(outputs, precision)


def place_of(group: str) -> tuple[str, int | None]:
    """Returns what a group is in every layer, and its layer; None outside of layers."""
    match = _GROUP.fullmatch(group)
    assert match is not None, group
    return match[2], int(match[1]) if match[1] else None


def width_rows(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns the chosen widths for people: one row for each kind of group and width, all together in the last row.

    A row has kind, bits or type, layers, size and share of the summed error.
    """
    total = sum(entry["error"] for entry in groups.values()) or 1.0
    found: dict[tuple[str, int | str], list[tuple[int | None, Mapping[str, Any]]]] = {}
    for name, entry in groups.items():
        kind, layer = place_of(name)
        found.setdefault((kind, entry["width"]), []).append((layer, entry))
    rows = [(kind, width_words(width), entries) for (kind, width), entries in sorted(found.items(), key=_by_name)]
    everything = [entry for _, _, entries in rows for entry in entries]
    return [
        (
            kind,
            words,
            _ranges(sorted({layer for layer, _ in entries if layer is not None})),
            format_size(sum(entry["bytes"] for _, entry in entries)),
            f"{sum(entry['error'] for _, entry in entries) / total:.1%}",
        )
        for kind, words, entries in [*rows, ("all of these", "", everything)]
    ]


def _by_name(found: tuple[tuple[str, int | str], Any]) -> tuple[str, bool, int | str]:
    (kind, width), _ = found
    return kind, isinstance(width, str), width


def width_words(width: int | str) -> str:
    """Returns a width for people."""
    if isinstance(width, str):  # a type of GGUF, or FP8
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
