"""How a run looks on a terminal: a progress bar, and the closing table."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsquant.recipe import format_size
from dsquant.telemetry import Progress as Step
from dsquant.telemetry import Report, silent

if TYPE_CHECKING:
    from dsquant.evaluation.results import Candidate, Evaluation
    from dsquant.records import Result

STAGES = {
    "scan": "checking",
    "quantize": "quantizing",
    "evaluate": "evaluating",
    "generate": "generating",
    "hash": "hashing",
    "verify": "verifying",
}


@contextmanager
def progress_bar(visible: bool = True) -> Iterator[Report]:
    """Shows a bar for each stage on standard error.

    Args:
        visible: whether to show anything.

    Yields:
        What a job reports to.
    """
    console = Console(stderr=True)
    if not visible or (console.is_jupyter and find_spec("ipywidgets") is None):  # rich draws nothing without it
        yield silent
        return
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[what]}{task.fields[rates]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}
        started: dict[str, float] = {}

        def report(step: Step) -> None:
            if step.stage not in tasks:
                _complete(progress, *tasks.values())
                tasks[step.stage] = progress.add_task(STAGES[step.stage], rates="", what="")
                started[step.stage] = time.monotonic()
            words = _rates(step, time.monotonic() - started[step.stage])
            what = _short_name(step.what)
            separator = ", " if words and what else ""
            progress.update(
                tasks[step.stage], total=step.total, completed=step.done, rates=words, what=f"{what}{separator}"
            )

        yield report
        _complete(progress, *tasks.values())


def _complete(progress: Progress, *tasks: TaskID) -> None:
    """A stage is over where the next one begins, or the job has ended well."""
    for task in tasks:
        total = next(one.total for one in progress.tasks if one.id == task)
        progress.update(task, completed=total or 1, total=total or 1, what="")


def _rates(step: Step, elapsed_s: float) -> str:
    parts = [f"{format_size(step.bytes_read)} read"] if step.bytes_read else []
    if step.bytes_written:
        parts.append(f"{format_size(step.bytes_written)} written")
    if step.stage == "quantize" and step.tokens and elapsed_s > 0:
        parts.append(f"{step.tokens / elapsed_s:,.0f} tokens/s")
    return ", ".join(parts)


def _short_name(name: str) -> str:
    """`layer 3 expert 17` for `model.layers.3.mlp.experts.17`."""
    parts = name.removeprefix("model.layers.").split(".")
    if not name.startswith("model.layers.") or not parts[0].isdigit():
        return name
    expert = f" expert {parts[3]}" if "experts" in parts[:3] and len(parts) > 3 else ""
    return f"layer {parts[0]}{expert}"


def print_result(result: "Result", console: Console | None = None) -> None:
    """Prints the closing table."""
    console = console or Console()
    for renderable in result.tables():
        console.print(renderable)


def print_evaluation(evaluation: "Evaluation", output: Path | None = None, console: Console | None = None) -> None:
    """Prints an evaluation: candidates side by side, then each one's scores, what is broken in it, and its gates.

    Args:
        evaluation: what was found.
        output: where its reports lie, if anywhere.
        console: where to print; standard output where it is left out.
    """
    console = console or Console()
    reference = evaluation.reference
    table = _table(f"Against {reference.path} ({reference.format}, {format_size(reference.size_bytes)})")
    for heading in ("candidate", "verdict", "format", "size", "bits", "mean KL"):
        _add_column(table, heading, 3)
    for one in evaluation.candidates:
        broken = None if one.first_broken_layer is None else f"layer {one.first_broken_layer} broken"
        verdict = ", ".join(filter(None, (one.verdict, broken))) or "no gates"
        size = format_size(one.size_bytes)
        table.add_row(one.name, verdict, one.format, size, f"{one.bits_per_weight:.2f}", f"{one.mean_kl:.4f}")
    console.print(table)
    for one in evaluation.candidates:
        console.print(_texts_table(one))
        _print_details(one, console)
    _print_code(evaluation, console)
    noise = max(scores.mean_kl.estimate for scores in evaluation.noise_floor.values())
    console.print(f"Noise floor: the original against itself in batches of another size has a mean KL of {noise:.2g}.")
    for caveat in evaluation.caveats:
        console.print(f"Note: {caveat}.", markup=False)
    for one in evaluation.candidates:
        _print_gates(one, console)
    if output is not None:
        console.print(f"Report: {output / 'report.html'} (also report.md, report.json)", soft_wrap=True, markup=False)


def _table(title: str) -> Table:
    """A table that is narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _add_column(table: Table, heading: str, left: int = 1) -> None:
    justify: JustifyMethod = "left" if len(table.columns) < left else "right"
    table.add_column(heading, justify=justify, overflow="fold")


def _print_code(evaluation: "Evaluation", console: Console) -> None:
    """What generated code tells of every candidate."""
    drifts = [(one.name, one.drift) for one in evaluation.candidates if one.drift is not None]
    table = _table("Generated code against the original's")
    for heading in ("candidate", "BLEU", "chrF", "CodeBLEU", "same text", "BLEU lost", "pass@1 (original's)"):
        _add_column(table, heading)
    for name, drift in drifts:
        found, lost, run = drift.candidate_vs_original, drift.measures.get("code_bleu_drop"), drift.execution
        if found is None:
            assert drift.agreement is not None
            console.print(f"{name}: ranks {drift.agreement.estimate:.1%} of the original's greedy tokens first too.")
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
    console.print(table)
    console.print("BLEU lost: points that the candidate loses to the original, both against the reference solutions.")


def _texts_table(candidate: "Candidate") -> Table:
    """Perplexities with the interval of their ratio, divergence and agreement on every text."""
    table = _table(f"{candidate.name}: perplexity, KL divergence in nats, agreement")
    for heading in ("text", "original", "candidate", "ratio", "interval", "mean KL", "99 % KL", "top 1"):
        _add_column(table, heading)
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


def _print_details(candidate: "Candidate", console: Console) -> None:
    """Router overlap and findings of one candidate."""
    overlaps = [layer for layer in candidate.layers if layer.router_overlap is not None]
    if overlaps:
        worst = min(overlaps, key=lambda layer: layer.router_overlap.estimate if layer.router_overlap else 1.0)
        assert worst.router_overlap is not None
        overlap = f"{worst.router_overlap.estimate:.1%}"
        console.print(f"{candidate.name}: layer {worst.index} chooses the fewest of the original's experts, {overlap}.")
    for finding in candidate.findings:
        console.print(f"{candidate.name}: broken? {finding.message}.", style="red", markup=False)


def _print_gates(candidate: "Candidate", console: Console) -> None:
    """The gates that did not pass, and how many did."""
    for gate in candidate.gates:
        if gate.verdict != "pass":
            style = "red" if gate.verdict == "fail" else "yellow"
            console.print(f"{candidate.name}: gate {gate.message}", style=style, markup=False)
    if candidate.gates:
        passed = sum(gate.verdict == "pass" for gate in candidate.gates)
        style = "green" if passed == len(candidate.gates) else ""
        console.print(f"{candidate.name}: {passed} of {len(candidate.gates)} gates pass", style=style, markup=False)
