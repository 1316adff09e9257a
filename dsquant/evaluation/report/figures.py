"""Chooses the charts of the report page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsquant.evaluation.report.charts import Series, bar_chart, line_chart, scatter_chart

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
    """Draws the candidates' sizes against their KL and their code BLEU."""
    unit, divisor = _unit(evaluation)
    series = [
        Series(one.name, ((one.size_bytes / divisor, one.mean_kl),), number)
        for number, one in enumerate(evaluation.candidates)
    ]
    caption = f"Lower left is better. The original takes {evaluation.reference.size_bytes / divisor:.3g} {unit}."
    svg = scatter_chart(series, f"size, {unit}", "mean KL, nats a token")
    figures = [Figure("Mean KL", caption, svg)]
    coded = [
        Series(one.name, ((one.size_bytes / divisor, 100 * one.drift.candidate_vs_original.bleu),), number)
        for number, one in enumerate(evaluation.candidates)
        if one.drift is not None and one.drift.candidate_vs_original is not None
    ]
    if coded:
        caption = "BLEU of the candidate's completions against the original's: upper left is better."
        svg = scatter_chart(coded, f"size, {unit}", "code BLEU against the original")
        figures.append(Figure("Generated code", caption, svg))
    return [figure for figure in figures if figure.svg]


def _unit(evaluation: "Evaluation") -> tuple[str, int]:
    return ("GiB", 2**30) if evaluation.reference.size_bytes >= 2**30 else ("MiB", 2**20)


def kl_by_position(evaluation: "Evaluation") -> list[Figure]:
    """Draws KL over the length of a sample, a chart for each text."""
    figures = []
    for text in evaluation.texts:
        series = [
            Series(one.name, tuple((float(at), kl) for at, kl in one.texts[text.name].kl_by_position), number)
            for number, one in enumerate(evaluation.candidates)
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
            Series(one.name, tuple((float(at.index), y) for at in one.layers if (y := measure(at)) is not None), number)
            for number, one in enumerate(evaluation.candidates)
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
    for number, one in enumerate(evaluation.candidates):
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


def _legend(evaluation: "Evaluation") -> tuple[tuple[str, int], ...]:
    candidates: tuple[Candidate, ...] = evaluation.candidates
    return tuple((one.name, number) for number, one in enumerate(candidates)) if len(candidates) > 1 else ()
