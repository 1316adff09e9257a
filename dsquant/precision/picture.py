"""Draws a choice: a row for each kind of tensor, a column for each layer, the type as colour, its error as a dot."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dsquant.escaping import html
from dsquant.precision.groups import place_of, width_words

_LEFT, _TOP, _ROW = 190, 26, 18
_STYLE = (
    "text{font:11px sans-serif;fill:#333}circle{fill:#fff;stroke:#333;stroke-width:.7}svg{background:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}svg{background:#111}}"
)


def choice_picture(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns an SVG of chosen widths: group -> its entry in a job's record.

    The area of a dot is the group's error; finer widths are darker. Names and figures show where one points.
    """
    places = {name: place_of(name) for name in groups}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = max((layer for _, layer in places.values() if layer is not None), default=0) + 1
    column = max(6, min(_ROW, 900 // layers))
    found = {entry["width"] for entry in groups.values()}
    order = sorted(found, key=lambda width: (-_coarseness(groups.values(), width), str(width)))
    largest = max((entry["error"] for entry in groups.values()), default=0.0) or 1.0
    parts = [f'<text x="{_LEFT - 8}" y="{_TOP + _ROW * row + 13}" text-anchor="end">{html(kind)}</text>'
             for row, kind in enumerate(kinds)]  # fmt: skip
    for number in range(0, layers, max(1, math.ceil(30 / column))):
        parts.append(
            f'<text x="{_LEFT + column * number + column / 2}" y="{_TOP - 8}" text-anchor="middle">{number}</text>'
        )
    for name, entry in groups.items():
        kind, layer = places[name]
        x, y = _LEFT + column * (layer or 0), _TOP + _ROW * kinds.index(kind)
        words = f"{name}: {width_words(entry['width'])}, {entry['error']:.2e} nats"
        radius = 0.5 * column * math.sqrt(entry["error"] / largest)
        parts.append(
            f'<g><title>{html(words)}</title><rect x="{x}" y="{y}" width="{column - 1}" height="{_ROW - 1}" '
            f'fill="{_colour(order.index(entry["width"]), len(order))}"/>'
            f'<circle cx="{x + (column - 1) / 2:.1f}" cy="{y + (_ROW - 1) / 2:.1f}" r="{radius:.1f}"/></g>'
        )
    bottom = _TOP + _ROW * len(kinds) + 14
    for place, width in enumerate(order):
        x, y = _LEFT + 90 * (place % 6), bottom + _ROW * (place // 6)
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{_colour(place, len(order))}"/>')
        parts.append(f'<text x="{x + 19}" y="{y + 11}">{html(width_words(width))}</text>')
    right = _LEFT + max(540, column * layers) + 10
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom + _ROW * (1 + len(order) // 6)}"'
    return f"<svg {box}><style>{_STYLE}</style>{''.join(parts)}</svg>\n"


def _coarseness(groups: Iterable[Mapping[str, Any]], width: int | str) -> float:
    """A width's mean share of the error that a group's coarsest width has."""
    shares = [
        entry["errors"][str(width)] / (max(entry["errors"].values()) or 1.0)
        for entry in groups
        if str(width) in entry["errors"]
    ]
    return sum(shares) / len(shares)


def _colour(place: int, count: int) -> str:
    return f"hsl(215 60% {88 - 58 * place / max(1, count - 1):.0f}%)"
