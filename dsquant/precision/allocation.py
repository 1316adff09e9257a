"""Divides a budget of bytes among groups that can each be stored at several widths: least summed error.

A width names a way to store a group: bits of a code, or a type of GGUF.

Each group's widths that lie on the lower convex hull of (bytes, error) are its steps. Steps of all groups, in the order
of their gain for each byte, are taken until one does not fit: that is the optimum for the size reached (Shoham and
Gersho, 1988). The remaining bytes are filled with later steps that fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

Width = TypeVar("Width", bound=int | str)


@dataclass(frozen=True)
class GroupCosts(Generic[Width]):
    """A group and what it may become."""

    name: str
    num_bytes: Mapping[Width, int]
    """Width -> stored bytes."""
    errors: Mapping[Width, float]
    """Width -> squared error that this width adds."""


@dataclass(frozen=True)
class _Step(Generic[Width]):
    """A group made wider."""

    place: int
    """The group's."""
    width: Width
    num_bytes: int
    """More than before."""
    gain: float
    """Less error than before."""


def allocate(choices: Sequence[GroupCosts[Width]], budget_bytes: int) -> dict[str, Width]:
    """Chooses a width for each group; the budget is at least the sum of the smallest.

    The summed error is never above that of any one width for all groups that fits, and never rises with the budget.
    """
    hulls = [_hull(choice) for choice in choices]
    smallest = [hull[0] for hull in hulls]
    assert _bytes(choices, smallest) <= budget_bytes, "the budget does not hold the smallest widths"
    steps = sorted(_steps(choices, hulls), key=lambda step: -step.gain / step.num_bytes)
    candidates = [*_filled(smallest, steps, budget_bytes - _bytes(choices, smallest)), *_uniform(choices, budget_bytes)]
    best = min(candidates, key=lambda widths: (_error(choices, widths), _bytes(choices, widths)))
    return {choice.name: width for choice, width in zip(choices, best, strict=True)}


def _hull(choice: GroupCosts[Width]) -> list[Width]:
    """The widths on the lower convex hull, from the smallest up: each costs more bytes, errs less, and gains less."""
    hull: list[Width] = []
    for width in sorted(choice.num_bytes, key=lambda width: (choice.num_bytes[width], choice.errors[width])):
        if hull and choice.errors[width] >= choice.errors[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(choice, hull[-2], hull[-1]) <= _slope(choice, hull[-2], width):
            hull.pop()
        hull.append(width)
    return hull


def _slope(choice: GroupCosts[Width], width: Width, wider: Width) -> float:
    gain = choice.errors[width] - choice.errors[wider]
    return gain / max(1, choice.num_bytes[wider] - choice.num_bytes[width])


def _steps(choices: Sequence[GroupCosts[Width]], hulls: Sequence[Sequence[Width]]) -> Iterator[_Step[Width]]:
    for place, (choice, hull) in enumerate(zip(choices, hulls, strict=True)):
        for width, wider in pairwise(hull):
            more = choice.num_bytes[wider] - choice.num_bytes[width]
            yield _Step(place, wider, max(1, more), choice.errors[width] - choice.errors[wider])


def _filled(smallest: Sequence[Width], steps: Sequence[_Step[Width]], left: int) -> Iterator[list[Width]]:
    """Steps in their order until one does not fit; then the later ones that fit, up to each size that a step has.

    Only so many sizes and so strict an order keep the result from getting worse when the budget grows.
    """
    widths, first = list(smallest), 0
    while first < len(steps) and steps[first].num_bytes <= left:
        widths[steps[first].place] = steps[first].width
        left -= steps[first].num_bytes
        first += 1
    yield list(widths)
    for largest in sorted({step.num_bytes for step in steps[first:] if step.num_bytes <= left}):
        filled, room, frozen = list(widths), left, set[int]()
        for step in steps[first:]:
            if step.num_bytes > largest or step.place in frozen:
                frozen.add(step.place)  # its later steps begin where this one ends
                continue
            if step.num_bytes > room:
                break
            filled[step.place] = step.width
            room -= step.num_bytes
        yield filled


def _uniform(choices: Sequence[GroupCosts[Width]], budget_bytes: int) -> Iterator[list[Width]]:
    for width in [width for width in choices[0].num_bytes if all(width in choice.num_bytes for choice in choices)]:
        widths = [width] * len(choices)
        if _bytes(choices, widths) <= budget_bytes:
            yield widths


def _bytes(choices: Sequence[GroupCosts[Width]], widths: Sequence[Width]) -> int:
    return sum(choice.num_bytes[width] for choice, width in zip(choices, widths, strict=True))


def _error(choices: Sequence[GroupCosts[Width]], widths: Sequence[Width]) -> float:
    return sum(choice.errors[width] for choice, width in zip(choices, widths, strict=True))
