"""Lays out an evaluation in a few tables and lines for the command line and `print`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsquant.evaluation.bands import verdict
from dsquant.options import format_size
from dsquant.reporting.notebook import narrow_table

if TYPE_CHECKING:
    from dsquant.evaluation.results import Candidate, Evaluation


def tables(evaluation: "Evaluation") -> Iterator[RenderableType]:
    """Yields candidates side by side, then each one's scores, broken parts and gates."""
    yield _candidates_table(evaluation)
    for one in evaluation.candidates:
        yield _texts_table(one)
        yield Text(verdict(one.name, one.mean_kls))
        yield from _details(one)
    yield from _code(evaluation)
    noise = max(scores.mean_kl.estimate for scores in evaluation.noise_floor.values())
    yield Text(f"Noise floor: the original against itself in batches of another size has a mean KL of {noise:.2g}.")
    for caveat in evaluation.caveats:
        yield Text(f"Note: {caveat}.")
    for one in evaluation.candidates:
        yield from _gates(one)


def _candidates_table(evaluation: "Evaluation") -> Table:
    reference = evaluation.reference
    title = f"Against {reference.path} ({reference.format}, {format_size(reference.size_bytes)})"
    table = narrow_table(title, ("candidate", "verdict", "format", "size", "bits", "mean KL"), left=3)
    for one in evaluation.candidates:
        broken = None if one.first_broken_layer is None else f"layer {one.first_broken_layer} broken"
        verdict = ", ".join(filter(None, (one.verdict, broken))) or "no gates"
        size = format_size(one.size_bytes)
        table.add_row(one.name, verdict, one.format, size, f"{one.bits_per_weight:.2f}", f"{one.mean_kl:.4f}")
    return table


def _code(evaluation: "Evaluation") -> Iterator[RenderableType]:
    """Yields the scores of every candidate's generated code."""
    drifts = [(one.name, one.drift) for one in evaluation.candidates if one.drift is not None]
    headings = ("candidate", "BLEU", "chrF", "CodeBLEU", "same text", "BLEU lost", "pass@1 (original's)")
    table = narrow_table("Generated code against the original's", headings)
    for name, drift in drifts:
        found, lost, run = drift.candidate_vs_original, drift.measures.get("code_bleu_drop"), drift.execution
        if found is None:
            assert drift.agreement is not None
            yield Text(f"{name}: ranks {drift.agreement.estimate:.1%} of the original's greedy tokens first too.")
            continue
        scores = (found.bleu, found.chrf, found.code_bleu.total)
        table.add_row(
            name,
            *(f"{100 * score:.1f}" for score in scores),
            f"{found.exact_match:.0%}",
            "" if lost is None else f"{lost.estimate:.2f}",
            "" if run is None else f"{run.pass_candidate.estimate:.1%} ({run.pass_original.estimate:.1%})",
        )
    if not table.rows:
        return
    if all(drift.execution is None for _, drift in drifts):
        table.columns.pop()
    yield table
    yield Text("BLEU lost: points that the candidate loses to the original, both against the reference solutions.")


def _texts_table(candidate: "Candidate") -> Table:
    """Returns perplexities with the interval of their ratio, divergence and agreement on every text."""
    headings = ("text", "original", "candidate", "ratio", "interval", "mean KL", "99th percentile of KL", "top 1")
    table = narrow_table(f"{candidate.name}: perplexity, KL divergence in nats, agreement", headings)
    for text, found in candidate.texts.items():
        ratio = found.perplexity_ratio
        table.add_row(
            text,
            f"{found.perplexity_original:.3f}",
            f"{found.perplexity:.3f}",
            f"{ratio.estimate:.4f}",
            f"{ratio.low:.3f}–{ratio.high:.3f}",
            f"{found.mean_kl.estimate:.4f}",
            f"{found.kl.p99:.4f}",
            f"{found.top1_agreement.estimate:.1%}",
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
