"""Writes report.html: one file with everything in it, and the same for a notebook."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.escaping import counted, html, printable
from dsquant.evaluation.bands import verdicts
from dsquant.evaluation.report import figures, tables
from dsquant.evaluation.report.charts import interval_chart
from dsquant.evaluation.report.task_table import task_table

if TYPE_CHECKING:
    from dsquant.evaluation.results import Evaluation

TEMPLATE = "page.html.jinja"
EXAMPLES = 8


def page(evaluation: "Evaluation") -> str:
    """Returns the text of report.html, which loads nothing from anywhere."""
    title = html(f"{_names(evaluation)} against {evaluation.reference.path}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
    body = f'<body style="margin:0">\n{part(evaluation)}\n</body>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>{body}</html>\n'


def _shown(value: Any) -> Any:
    """Makes foreign text printable in a page; HTML stays as it is."""
    return printable(value) if type(value) is str else value


def part(evaluation: "Evaluation") -> str:
    """Returns an evaluation as HTML for a notebook's cell, with its own style, which affects nothing outside."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, finalize=_shown)
    execution = tables.execution(evaluation)
    return environment.get_template(TEMPLATE).render(
        evaluation=evaluation,
        names=_names(evaluation),
        subtitle=_subtitle(evaluation),
        verdicts=("pass", "fail", "inconclusive"),
        verdict_words=_verdict_words(evaluation),
        sentences=verdicts(evaluation),
        findings=[(one.name, finding) for one in evaluation.given for finding in one.findings],
        summary=tables.summary(evaluation),
        gates=_gates(evaluation),
        size_figures=figures.size_against_drift(evaluation),
        place_figures=[*figures.by_layer(evaluation), *figures.kl_by_position(evaluation)],
        texts=tables.texts(evaluation),
        drift=[*tables.drift(evaluation), *([execution] if execution else [])],
        tasks=task_table(evaluation),
        example_groups=_examples(evaluation),
        tensor_figures=figures.worst_tensors(evaluation),
        details=[
            *tables.ladders(evaluation),
            *(tables.layers(one) for one in evaluation.given),
            *(tables.weights(one) for one in evaluation.given),
        ],
        identity=tables.identity(evaluation),
    )


def _names(evaluation: "Evaluation") -> str:
    return ", ".join(one.name for one in evaluation.given)


def _subtitle(evaluation: "Evaluation") -> str:
    tokens = sum(next(iter(evaluation.candidates)).texts[text.name].tokens for text in evaluation.texts)
    names = ", ".join(text.name for text in evaluation.texts)
    reference = evaluation.reference
    experts = f", {reference.num_experts} experts" if reference.num_experts else ""
    return (
        f"{reference.architecture}, {counted(reference.num_layers, 'layer')}{experts}; {tokens} tokens of {names}; "
        f"intervals of {evaluation.identity.confidence:.0%}"
    )


def _verdict_words(evaluation: "Evaluation") -> str:
    """Returns the reasons for the verdict: for each candidate the deciding gates and the first broken layer."""
    gates = [gate for one in evaluation.candidates for gate in one.gates]
    if evaluation.verdict == "pass":
        return f"{len(gates)} of {counted(len(gates), 'gate')} passed."
    words = []
    for one in evaluation.candidates:
        deciding = dict.fromkeys(gate.metric for gate in one.gates if gate.verdict == evaluation.verdict)
        layer = one.first_broken_layer
        broken = "" if layer is None else f" (breaks first in layer {layer})"
        if deciding:
            words.append(f"{one.name}: {', '.join(deciding)}{broken}")
    return "; ".join(words) + "."


def _gates(evaluation: "Evaluation") -> list[dict[str, Any]]:
    return [
        {
            "candidate": one.name,
            "name": gate.metric + (f" on {gate.text}" if gate.text else ""),
            "found": tables.interval(gate.found),
            "limit": f"{'≤' if gate.bound == 'at_most' else '≥'} {gate.limit:g}",
            "svg": interval_chart(gate.found.estimate, gate.found.low, gate.found.high, gate.limit, gate.verdict),
            "verdict": gate.verdict,
            "needed": counted(gate.needed, gate.unit.removesuffix("s")) if gate.needed else "",
        }
        for one, gate in tables.ordered_gates(evaluation)
    ]


def _examples(evaluation: "Evaluation") -> list[tuple[str, list[dict[str, str]]]]:
    """Returns completions side by side, from where they diverge; those that diverge first come first."""
    groups = []
    for one in evaluation.given:
        if one.drift is None:
            continue
        differing = [example for example in one.drift.examples if example.first_divergence is not None]
        differing.sort(key=lambda example: example.first_divergence or 0)
        shown = []
        for example in differing[:EXAMPLES]:
            same = _common_beginning(example.original, example.candidate)
            rest = {"original": example.original[len(same) :], "candidate": example.candidate[len(same) :]}
            shown.append({"name": example.name, "prompt": example.prompt, "same": same, **rest})
        if shown:
            groups.append((one.name, shown))
    return groups


def _common_beginning(one: str, other: str) -> str:
    places = (place for place, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)
    return one[: next(places, min(len(one), len(other)))]
