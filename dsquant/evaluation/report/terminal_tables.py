"""Lays out an evaluation in a few tables and lines for the command line and `print`."""

from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.evaluation.bands import verdicts, written
from dsquant.evaluation.report.tables import BLEU_CHANGE, bleu_change
from dsquant.evaluation.report.task_table import task_table
from dsquant.options import format_size
from dsquant.reporting.notebook import narrow_table

if TYPE_CHECKING:
    from dsquant.evaluation.results import Candidate, Evaluation


def tables(evaluation: "Evaluation") -> Iterator[RenderableType]:
    """Yields all candidates side by side, their scores on every text and in code, then what stands out in each."""
    yield _candidates_table(evaluation)
    yield _texts_table(evaluation)
    yield from _code(evaluation)
    yield from _tasks(evaluation)
    for sentence in verdicts(evaluation):
        yield Text(sentence)
    for one in evaluation.given:
        yield from _details(one)
    noise = max(scores.mean_kl.estimate for scores in evaluation.noise_floor.values())
    yield Text(f"Noise floor: the original against itself in batches of another size has a mean KL of {noise:.2g}.")
    for caveat in evaluation.caveats:
        yield Text(f"Note: {caveat}.")
    for one in evaluation.candidates:
        yield from _gates(one)


def _candidates_table(evaluation: "Evaluation") -> Table:
    reference = evaluation.reference
    title = f"Against {reference.path} ({reference.format}, {format_size(reference.size_bytes)})"
    headings = ("candidate", "gates", "format", "size", "bits", "mean KL", "same top token")
    rows = []
    for one in evaluation.candidates:
        broken = None if one.first_broken_layer is None else f"layer {one.first_broken_layer} broken"
        outcome = ", ".join(filter(None, (one.verdict, broken)))
        top = fmean(text.top1_agreement.estimate for text in one.texts.values())
        size, bits = format_size(one.size_bytes), f"{one.bits_per_weight:.2f}"
        rows.append((one.name, outcome, one.format, size, bits, f"{one.mean_kl:.4f}", f"{top:.1%}"))
    kept = [at for at in range(len(headings)) if any(row[at] for row in rows)]  # no gates, no column of them
    table = narrow_table(title, [headings[at] for at in kept], left=3 - (1 not in kept))
    for row in rows:
        table.add_row(*(row[at] for at in kept))
    return table


def _code(evaluation: "Evaluation") -> Iterator[RenderableType]:
    """Yields the scores of every candidate's generated code."""
    drifts = [(one, one.drift) for one in evaluation.candidates if one.drift is not None]
    headings = ("candidate", "BLEU", "chrF", "CodeBLEU", "same text", "code BLEU change", "pass@1 (original's)")
    table = narrow_table("Generated code against the original's", headings)
    for one, drift in drifts:
        found, run = drift.candidate_vs_original, drift.execution
        if found is None:
            assert drift.agreement is not None
            yield Text(f"{one.name}: ranks {drift.agreement.estimate:.1%} of the original's greedy tokens first too.")
            continue
        scores = (found.bleu, found.chrf, found.code_bleu.total)
        table.add_row(
            one.name,
            *(f"{100 * score:.1f}" for score in scores),
            f"{found.exact_match:.0%}",
            bleu_change(one),
            "" if run is None else f"{run.pass_candidate.estimate:.1%} ({run.pass_original.estimate:.1%})",
        )
    if not table.rows:
        return
    if all(drift.execution is None for _, drift in drifts):
        table.columns.pop()
    yield table
    yield Text(BLEU_CHANGE)


def _tasks(evaluation: "Evaluation") -> Iterator[RenderableType]:
    """Yields scores in tasks, and of groups without their tasks."""
    found = task_table(evaluation, every=False)
    if found is not None:
        table = narrow_table("Tasks, scored by lm-evaluation-harness", found.headings, left=2)
        for row in found.rows:
            table.add_row(*row)
        yield table
        yield Text(found.note)


def _texts_table(evaluation: "Evaluation") -> Table:
    """Returns perplexity, its ratio to the original's with the interval, and divergence on every text."""
    headings = ("text", "model", "perplexity", "ratio", "interval", "mean KL", "99 % of KL")
    table = narrow_table("On each text (KL divergence in nats)", headings, left=2)
    for text in evaluation.texts:
        scored = [(one.name, one.texts[text.name]) for one in evaluation.candidates if text.name in one.texts]
        for number, (name, found) in enumerate(scored):
            if number == 0:
                table.add_row(text.name, "original", written(found.perplexity_original))
            ratio = found.perplexity_ratio
            table.add_row(
                "",
                name,
                written(found.perplexity),
                f"{ratio.estimate:.3f}",
                f"{ratio.low:.3f}–{ratio.high:.3f}",
                f"{found.mean_kl.estimate:.4f}",
                f"{found.kl.p99:.3f}",
            )
    return table


def _details(candidate: "Candidate") -> Iterator[Text]:
    """Yields router overlap and findings of one candidate."""
    overlaps = [layer for layer in candidate.layers if layer.router_overlap is not None]
    if overlaps:
        worst = min(overlaps, key=lambda layer: layer.router_overlap.estimate if layer.router_overlap else 1.0)
        assert worst.router_overlap is not None
        overlap = f"{worst.router_overlap.estimate:.1%}"
        yield Text(f"{candidate.name}: layer {worst.index} chooses the fewest of the original's experts, {overlap}.")
    for finding in candidate.findings:
        yield Text(f"{candidate.name}: broken? {finding.message}.", style="red")


def _gates(candidate: "Candidate") -> Iterator[Text]:
    """Yields the gates that did not pass, and how many did."""
    for gate in candidate.gates:
        if gate.verdict != "pass":
            yield Text(f"{candidate.name}: gate {gate.message}", style="red" if gate.verdict == "fail" else "yellow")
    if candidate.gates:
        passed = sum(gate.verdict == "pass" for gate in candidate.gates)
        style = "green" if passed == len(candidate.gates) else ""
        yield Text(f"{candidate.name}: {passed} of {len(candidate.gates)} gates passed", style=style)
