"""Shows a run on a terminal: a progress bar, and the final tables."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from dsquant.escaping import printable
from dsquant.options import format_size
from dsquant.reporting.notebook import Shown, plain_console
from dsquant.reporting.progress import Progress as Step
from dsquant.reporting.progress import Report, silent

STAGES = {
    "scan": "checking",
    "sensitivity": "measuring",
    "quantize": "quantizing",
    "evaluate": "evaluating",
    "generate": "generating",
    "tasks": "answering",
    "hash": "hashing",
    "verify": "verifying",
}
SHOWN_AGAIN_S = 0.5
"""Seconds between two updates of a notebook's cell."""
LOGGED_AGAIN_S = 60.0
"""Seconds between two lines of a log, where standard error is no terminal."""
LEAST_SHARE = 0.02
"""Of a stage, before its speed says how long the rest will take."""
SETTLED_S = 2.0
"""Seconds in which a resumed job passes what it has done before."""


@contextmanager
def progress_bar(visible: bool = True) -> Iterator[Report]:
    """Shows a bar for each stage on standard error or in a notebook's cell, and yields what a job reports to. A log,
    which has the bars at the end alone, gets a line at the beginning of a stage and every minute of the last one."""
    console = plain_console(stderr=True)
    if not visible:
        yield silent
        return
    if console.is_jupyter:
        with _bars_of_text() as report:
            yield report
        return
    progress, tasks = Progress(*_columns(), console=console), dict[str, TaskID]()
    started, logged_s = dict[str, tuple[float, float]](), -math.inf
    try:

        def report(step: Step) -> None:
            nonlocal logged_s
            if not tasks:
                progress.start()  # an error before the first step stands alone, without an empty line
            if step.stage not in tasks:
                _complete(progress, *tasks.values())
                tasks[step.stage] = progress.add_task(STAGES[step.stage], rates="", what="")
                started[step.stage] = time.monotonic(), step.done / (step.total or 1)
                logged_s = -math.inf
            (since, begun), now = started[step.stage], time.monotonic()
            if now - since < SETTLED_S:
                begun = step.done / (step.total or 1)
                started[step.stage] = since, begun
            words = _rates(step, now - since)
            what = _short_name(step.what)
            separator = ", " if words and what else ""
            progress.update(
                tasks[step.stage], total=step.total, completed=step.done, rates=words, what=f"{what}{separator}"
            )
            if not console.is_terminal and now - logged_s > LOGGED_AGAIN_S and step.stage == list(tasks)[-1]:
                logged_s, share = now, step.done / (step.total or 1)
                left = _left(share, begun, now - since)
                told = ", ".join(filter(None, (what, words, left)))
                console.print(_bar(STAGES[step.stage], share, now - since, told), soft_wrap=True)

        yield report
        _complete(progress, *tasks.values())
    finally:
        if tasks:
            progress.stop()


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=12, table_column=Column(min_width=12)),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(min_width=5)),
        TextColumn("{task.fields[what]}{task.fields[rates]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
    )


@contextmanager
def _bars_of_text() -> Iterator[Report]:
    """Shows the same in a notebook as plain text, which stays where the notebook is exported; a widget does not."""
    from IPython.display import DisplayHandle

    handle: Any = DisplayHandle()
    shown_s = 0.0
    lines: dict[str, str] = {}
    spans: dict[str, tuple[float, float]] = {}

    def show(begin: bool = False) -> None:
        text = {"text/plain": printable("\n".join(lines.values()))}
        (handle.display if begin else handle.update)(text, raw=True)

    def complete() -> None:
        for stage, (start, stop) in spans.items():
            lines[stage] = _bar(STAGES[stage], 1.0, stop - start)

    def report(step: Step) -> None:
        nonlocal shown_s
        first, new, now = not lines, step.stage not in lines, time.monotonic()
        if new:
            complete()
        start, _ = spans.get(step.stage, (now, now))
        spans[step.stage] = (start, now)
        words = ", ".join(filter(None, (_short_name(step.what), _rates(step, now - start))))
        lines[step.stage] = _bar(STAGES[step.stage], step.done / (step.total or 1), now - start, words)
        if new or now - shown_s > SHOWN_AGAIN_S:
            shown_s = now
            show(begin=first)

    yield report
    if lines:
        complete()
        show()


def _bar(name: str, share: float, elapsed_s: float, words: str = "") -> str:
    full = round(12 * share)
    return f"{name:10} {'━' * full}{'─' * (12 - full)} {share:4.0%} {elapsed_s:5.0f} s  {words}".rstrip()


def _left(share: float, begun: float, elapsed_s: float) -> str:
    """Says how long the rest of a stage will take, at the speed since it began at a share; nothing at its start."""
    done = share - begun
    if done < LEAST_SHARE or share >= 1:
        return ""
    return f"about {math.ceil(elapsed_s * (1 - share) / done / 60)} min left"


def _complete(progress: Progress, *tasks: TaskID) -> None:
    """Completes the bars of stages: a stage ends where the next one begins, or the job has succeeded."""
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
    """Returns `layer 3 expert 17` for `model.layers.3.mlp.experts.17`, and keeps the model that ` of` names."""
    module, of, model = name.partition(" of ")
    parts = module.removeprefix("model.layers.").split(".")
    if not name.startswith("model.layers.") or not parts[0].isdigit():
        return name
    expert = f" expert {parts[3]}" if "experts" in parts[:3] and len(parts) > 3 else ""
    return f"layer {parts[0]}{expert}{of}{model}"


def print_result(result: Shown, console: Console | None = None) -> None:
    """Prints a result's tables."""
    console = console or plain_console()
    for renderable in result.tables():
        console.print(renderable)


def print_evaluation(evaluation: Shown, output: Path | None = None, console: Console | None = None) -> None:
    """Prints an evaluation, and where its reports lie, to a console or standard output."""
    console = console or plain_console()
    print_result(evaluation, console)
    if output is not None:
        console.print(f"Report: {output / 'report.html'} (also report.md, report.json)", soft_wrap=True)
