"""Chooses the charts of the report page."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsquant.evaluation.report.charts import ORIGINAL, Series, bar_chart, line_chart, scatter_chart

if TYPE_CHECKING:
    from dsquant.evaluation.results import Candidate, Evaluation, LayerScores

BARS = 12


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, its message, and the names of its colours."""

    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, int], ...] = ()
    """(name, colour)."""


def size_against_drift(evaluation: "Evaluation") -> list[Figure]:
    """Draws the sizes of original and candidates against their KL and their code BLEU.

    A single candidate makes no chart: the summary's row says as much.
    """
    if len(evaluation.candidates) < 2:
        return []
    unit, divisor = _unit(evaluation)

    def chart(y_label: str, of_original: float, measure: Callable[["Candidate"], float | None]) -> str:
        size = evaluation.reference.size_bytes / divisor
        series = [Series("original", ((size, of_original),), ORIGINAL)]
        for one, colour in _coloured(evaluation):
            if (found := measure(one)) is not None:
                series.append(Series(one.name, ((one.size_bytes / divisor, found),), colour))
        return scatter_chart(series, f"size, {unit}", y_label) if len(series) > 1 else ""

    figures = [
        Figure("Mean KL", "Lower left is better.", chart("mean KL, nats a token", 0.0, lambda one: one.mean_kl)),
        Figure(
            "Generated code",
            "How much of the original's completions the candidate writes too: upper left is better.",
            chart("BLEU against the original's code", 100.0, _similarity_of_code),
        ),
    ]
    return [figure for figure in figures if figure.svg]


def _similarity_of_code(candidate: "Candidate") -> float | None:
    found = candidate.drift.candidate_vs_original if candidate.drift else None
    return None if found is None else 100 * found.bleu


def _unit(evaluation: "Evaluation") -> tuple[str, int]:
    return ("GiB", 2**30) if evaluation.reference.size_bytes >= 2**30 else ("MiB", 2**20)


def kl_by_position(evaluation: "Evaluation") -> list[Figure]:
    """Draws KL over the length of a sample, a chart for each text."""
    figures = []
    for text in evaluation.texts:
        series = [
            _line(one, colour, ((float(at), kl) for at, kl in one.texts[text.name].kl_by_position))
            for one, colour in _coloured(evaluation)
            if text.name in one.texts
        ]
        svg = line_chart(series, "position in the sample, tokens", "mean KL, nats")
        caption = "A rise to the right would mean that errors add up with the length of the context."
        if svg:
            figures.append(Figure(f"KL by position, {text.name}", caption, svg, _legend(evaluation)))
    return figures


def by_layer(evaluation: "Evaluation") -> list[Figure]:
    """Draws the error of each decoder layer."""
    legend = _legend(evaluation)

    def lines(measure: Callable[["LayerScores"], float | None]) -> list[Series]:
        return [
            _line(one, colour, ((float(at.index), y) for at in one.layers if (y := measure(at)) is not None))
            for one, colour in _coloured(evaluation)
        ]

    overlap = lines(lambda layer: layer.router_overlap.estimate if layer.router_overlap else None)
    figures = [
        Figure(
            "KL by layer",
            "KL of the next token if the model ended after this layer. A jump shows where the damage is done.",
            line_chart(lines(lambda layer: layer.kl), "layer", "mean KL, nats"),
            legend,
        ),
        Figure(
            "Error of each layer alone",
            "Relative error of the layer's update, on the original's input: free of earlier errors.",
            line_chart(lines(lambda layer: layer.local_error), "layer", "relative error", shares=True),
            legend,
        ),
        Figure(
            "Router overlap",
            "Share of a token's experts that the candidate chooses too.",
            line_chart(overlap, "layer", "experts in common", shares=True),
            legend,
        ),
    ]
    return [figure for figure in figures if figure.svg]


def worst_tensors(evaluation: "Evaluation") -> list[Figure]:
    """Draws the tensors with the largest errors, a chart for each candidate."""
    figures = []
    for number, one in enumerate(evaluation.given):
        rows = [(short_name(error.name), error.relative, error.activation_weighted) for error in one.weights[:BARS]]
        svg = bar_chart(rows, number, "activation-weighted")
        caption = "Relative error; the mark is the error as weighted by the tensor's inputs."
        if svg:
            figures.append(Figure(f"Worst tensors, {one.name}", caption, svg))
    return figures


def short_name(name: str) -> str:
    """Returns `3 · experts.17.down` for `model.layers.3.mlp.experts.17.down_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4:
        return name
    inside = [part.removesuffix("_proj") for part in parts[3:] if part not in ("mlp",)]
    return f"{parts[2]} · {'.'.join(inside)}"


def _coloured(evaluation: "Evaluation") -> "Iterator[tuple[Candidate, int]]":
    """Yields every candidate with its colour; plain rounding has that of its candidate, and dashed lines."""
    colours = {one.name: number for number, one in enumerate(evaluation.given)}
    return ((one, colours[one.plain_of or one.name]) for one in evaluation.candidates)


def _line(candidate: "Candidate", colour: int, points: Iterable[tuple[float, float]]) -> Series:
    return Series(candidate.name, tuple(points), colour, dashed=candidate.plain_of is not None)


def _legend(evaluation: "Evaluation") -> tuple[tuple[str, int], ...]:
    names = ((one.name + (" (dashed)" if one.plain_of else ""), colour) for one, colour in _coloured(evaluation))
    return tuple(names) if len(evaluation.candidates) > 1 else ()
