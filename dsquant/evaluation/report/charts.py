"""Draws charts as inline SVG with the page's CSS variables, so that light and dark both look right.

Colours are classes: `s0` .. `s7` for series, `original` for what is no candidate; everything else is
`axis`, `grid` and text. Numbers that are not finite are left out. A chart with nothing to draw is empty.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsquant.escaping import html

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 74, 16, 14, 42
NUM_COLOURS = 8
ORIGINAL = -1
"""The colour of what is no candidate."""
LABEL_HEIGHT = 15


@dataclass(frozen=True)
class Series:
    """One line, or one set of points."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    dashed: bool = False

    @property
    def style(self) -> str:
        """The class of its colour."""
        return "original" if self.colour == ORIGINAL else f"s{self.colour % NUM_COLOURS}"

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to pixels."""

    low: float
    high: float
    start: float
    stop: float
    """Pixels."""
    logarithmic: bool = False
    whole: bool = False
    """Whether only whole numbers get a tick."""

    def place(self, value: float) -> float:
        """Returns the pixel of a number."""
        low, high, value = (math.log10(one) if self.logarithmic else one for one in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Returns about five round numbers on the axis."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if math.log10(self.high / self.low) < 2.5 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        values = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in values if not self.whole or float(value).is_integer()]


def _round_step(width: float) -> float:
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * 0.999)


def axis_of(values: Sequence[float], start: float, stop: float, from_zero: bool = False) -> Axis:
    """Returns an axis from pixel `start` to `stop` that is a little longer than the numbers need.

    It is logarithmic where all numbers are positive and the largest is more than 10 times the smallest.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        return Axis(low / 1.3, high * 1.3, start, stop, logarithmic=True)
    low = min(0.0, low) if from_zero else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - room, high + room, start, stop)


def number(value: float) -> str:
    """Formats a number for an axis with three significant digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Formats a share for an axis."""
    return f"{100 * value:.3g}%"


def line_chart(series: Sequence[Series], x_label: str, y_label: str, shares: bool = False) -> str:
    """Draws lines over a common whole-numbered x; `shares` writes y in per cent."""
    points = [point for one in series for point in one.finite]
    if not points:
        return ""
    write = percent if shares else number
    y_axis = axis_of([y for _, y in points], HEIGHT - BOTTOM, TOP, from_zero=not shares)
    xs = [x for x, _ in points]
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    x_axis = Axis(min(xs), right, LEFT + 10, WIDTH - RIGHT - 8, whole=True)
    parts = _frame(x_axis, y_axis, write, x_label, y_label)
    for one in series:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in one.finite]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = " dashed" if one.dashed else ""
        parts.append(f'<polyline class="line {one.style}{dashed}" points="{path}"/>')
        for (x, y), (px, py) in zip(one.finite, places, strict=True):
            words = html(f"{one.name}, {x_label} {number(x)}: {write(y)}")
            dot = f'<circle class="dot {one.style}" cx="{px:.1f}" cy="{py:.1f}" r="3">'
            parts.append(f"{dot}<title>{words}</title></circle>")
    return _svg(parts, HEIGHT, f"{y_label} by {x_label}")


def scatter_chart(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Draws named points: the first point of each series. On a logarithmic axis what is 0 stands at the bottom."""
    points = [(one, one.finite[0]) for one in series if one.finite]
    if not points:
        return ""
    ys = [y for _, (_, y) in points]
    positive = [y for y in ys if y > 0]
    spread = bool(positive) and max(positive) > 10 * min(positive)
    y_axis = axis_of(positive if spread else ys, HEIGHT - BOTTOM, TOP + 10, from_zero=True)
    xs = [x for _, (x, _) in points]
    room = max((max(xs) - min(xs)) * 0.15, max(xs) * 0.1) or 1.0
    x_axis = Axis(max(0.0, min(xs) - room), max(xs) + room, LEFT, WIDTH - RIGHT)
    parts = _frame(x_axis, y_axis, number, x_label, y_label)
    taken: list[tuple[float, float, float]] = []
    for one, (x, y) in sorted(points, key=lambda pair: pair[1][1]):
        px, py = x_axis.place(x), y_axis.place(max(y, y_axis.low))
        words = html(f"{one.name}: {number(x)}, {number(y)}")
        parts.append(
            f'<circle class="dot {one.style}" cx="{px:.1f}" cy="{py:.1f}" r="6"><title>{words}</title></circle>'
        )
        width, left = 6.8 * len(one.name), px > WIDTH * 0.62
        start = px - 11 - width if left else px + 11
        label = _free_place(taken, start, start + width, py + 4)
        taken.append((start, start + width, label))
        anchor = "end" if left else "start"
        place = f'x="{px + (-11 if left else 11):.1f}" y="{label:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="label" {place}>{html(one.name)}</text>')
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}")


def _free_place(taken: Sequence[tuple[float, float, float]], start: float, stop: float, wanted: float) -> float:
    """Returns the height next to the wanted one where a label covers no other."""

    def free(height: float) -> bool:
        return not any(
            start < other_stop and other_start < stop and abs(height - other) < LABEL_HEIGHT
            for other_start, other_stop, other in taken
        )

    shifts = [sign * 3 * step for step in range(60) for sign in (-1, 1)]
    heights = (wanted + shift for shift in shifts if TOP + 8 < wanted + shift < HEIGHT - BOTTOM)
    return next((height for height in heights if free(height)), wanted)


def bar_chart(rows: Sequence[tuple[str, float, float | None]], colour: int, marker: str) -> str:
    """Draws horizontal bars with names before and numbers after them.

    Each row is a name, the length of its bar, and the place of a marker or None; `marker` says what the markers are.
    """
    drawn = [row for row in rows if math.isfinite(row[1])]
    if not drawn:
        return ""
    longest = max(max(length, mark or 0.0) for _, length, mark in drawn) or 1.0
    start, stop, step = 262, WIDTH - 70, 21
    parts = []
    for place, (name, length, mark) in enumerate(drawn):
        top, width = 6 + place * step, (stop - start) * length / longest
        words = f"{name}: {percent(length)}" + (f", {marker} {percent(mark)}" if mark is not None else "")
        parts.append(f'<text class="label" x="{start - 8}" y="{top + 12}" text-anchor="end">{html(name)}</text>')
        bar = (
            f'<rect class="bar s{colour % NUM_COLOURS}" x="{start}" y="{top}" width="{max(1.0, width):.1f}" height="15"'
        )
        parts.append(f'{bar} rx="2"><title>{html(words)}</title></rect>')
        if mark is not None and math.isfinite(mark):
            at = start + (stop - start) * mark / longest
            parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 1}" y2="{top + 16}"/>')
        behind = start + max(width, (stop - start) * (mark or 0.0) / longest) + 7
        parts.append(f'<text class="tick" x="{behind:.1f}" y="{top + 12}">{percent(length)}</text>')
    return _svg(parts, 10 + len(drawn) * step, "bars")


def interval_chart(estimate: float, low: float, high: float, limit: float, verdict: str) -> str:
    """Draws an interval next to its limit, on its own scale, in the colour of its verdict."""
    if not all(math.isfinite(value) for value in (estimate, low, high)):
        return ""
    width, height = 180, 22
    least, most = min(low, limit), max(high, limit)
    room = (most - least) * 0.12 or abs(most) * 0.1 or 1.0
    axis = Axis(least - room, most + room, 4, width - 4)
    ends, middle, at = (axis.place(low), axis.place(high)), axis.place(estimate), axis.place(limit)
    parts = [
        f'<line class="grid" x1="4" x2="{width - 4}" y1="11" y2="11"/>',
        f'<line class="range {verdict}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="11" y2="11"/>',
        f'<circle class="{verdict}" cx="{middle:.1f}" cy="11" r="4"/>',
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="20"/>',
    ]
    words = html(f"{number(estimate)} [{number(low)}, {number(high)}], limit {number(limit)}")
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img"><title>{words}</title>{"".join(parts)}</svg>'
    )


def _frame(x_axis: Axis, y_axis: Axis, write_y: Callable[[float], str], x_label: str, y_label: str) -> list[str]:
    """Draws grid, ticks and the axes' names."""
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{write_y(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        place = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle"'
        parts.append(f'<text class="tick" {place}>{number(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html(x_label)}</text>')
    y_label += ", log scale" if y_axis.logarithmic else ""
    turned = f'transform="translate(13 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="name" {turned}>{html(y_label)}</text>')
    return parts


def _svg(parts: Sequence[str], height: int, words: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html(words)}"'
    return f'<svg class="chart" {box}>{"".join(parts)}</svg>'
