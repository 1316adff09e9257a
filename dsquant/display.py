"""How a run looks on a terminal: a progress bar, and the closing table."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dsquant.card import serve_command
from dsquant.evaluation.divergence import Divergence
from dsquant.recipe import format_size
from dsquant.telemetry import Progress as Step
from dsquant.telemetry import Report, silent

if TYPE_CHECKING:
    from dsquant.pipeline import Evaluation, Result

STAGES = {"scan": "checking the source", "quantize": "quantizing", "evaluate": "evaluating"}
LONGEST_NAME = 44


@contextmanager
def progress_bar(visible: bool = True) -> Iterator[Report]:
    """Shows a bar for each stage on standard error.

    Args:
        visible: whether to show anything.

    Yields:
        What a job reports to.
    """
    if not visible:
        yield silent
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:20}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rates]}  {task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}
        started: dict[str, float] = {}

        def report(step: Step) -> None:
            if step.stage not in tasks:
                for earlier in tasks.values():
                    progress.update(earlier, what="", visible=True)
                tasks[step.stage] = progress.add_task(STAGES[step.stage], rates="", what="")
                started[step.stage] = time.monotonic()
            rates = _rates(step, time.monotonic() - started[step.stage])
            what = step.what.removeprefix("model.")[-LONGEST_NAME:]
            progress.update(tasks[step.stage], total=step.total, completed=step.done, rates=rates, what=what)

        yield report


def _rates(step: Step, elapsed_s: float) -> str:
    parts = [f"read {format_size(step.bytes_read)}"]
    if step.bytes_written:
        parts.append(f"written {format_size(step.bytes_written)}")
    if step.tokens and elapsed_s > 0:
        parts.append(f"{step.tokens / elapsed_s:,.0f} layer tokens/s")
    return ", ".join(parts)


def print_result(result: "Result") -> None:
    """Prints the closing table."""
    console = Console()
    if result.already_finished:
        console.print(f"{result.output} is finished already; nothing to do")
    table = Table(title=f"{result.output}")
    for heading in ("checkpoint", "size", "of original"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    table.add_row("original", format_size(result.source_bytes), "100.0%")
    table.add_row("original as BF16", format_size(result.bf16_bytes), f"{result.bf16_bytes / result.source_bytes:.1%}")
    for name, size in result.output_bytes.items():
        table.add_row(name, format_size(size), f"{size / result.source_bytes:.1%}")
    console.print(table)
    for name, texts in result.divergence.items():
        console.print(divergence_table(f"{name} against the original, on held-out texts", texts))
    for warning in result.warnings:
        console.print(f"Note: {warning}.")
    for name, folder in result.folders.items():
        console.print(f"{name} is in {folder}; serve it with:\n  {serve_command(folder)}", soft_wrap=True)
    if not result.already_finished:
        peak = format_size(result.peak_resident_bytes)
        console.print(f"Done in {result.elapsed_s:.0f} s, with at most {peak} of memory.")


def print_evaluation(evaluation: "Evaluation") -> None:
    """Prints an evaluation's table."""
    Console().print(divergence_table(f"{evaluation.candidate} against {evaluation.reference}", evaluation.texts))


def divergence_table(title: str, texts: dict[str, Divergence]) -> Table:
    """A table of perplexity, KL divergence and agreement, one row for each text."""
    table = Table(title=title)
    headings = ("text", "tokens", "perplexity, original", "perplexity", "mean KL, nats", "same top token")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for name, found in texts.items():
        table.add_row(
            name,
            str(found.tokens),
            f"{found.perplexity_original:.3f}",
            f"{found.perplexity:.3f}",
            f"{found.mean_kl:.4f}",
            f"{found.top1_agreement:.1%}",
        )
    return table
