"""Lays out the scores in tasks of lm-evaluation-harness."""

from typing import TYPE_CHECKING

from dsquant.escaping import counted
from dsquant.evaluation.report.tables import NOTHING, Table, number

if TYPE_CHECKING:
    from dsquant.evaluation.intervals import Interval
    from dsquant.evaluation.results import Evaluation


def task_table(evaluation: "Evaluation", every: bool = True) -> Table | None:
    """Returns scores in tasks, the original's before the candidates'; None where none were asked. `every` shows the
    tasks of groups too."""
    scored = [one for one in evaluation.candidates if one.tasks]
    rows: list[tuple[str, ...]] = []
    for name, first in scored[0].tasks.items() if scored else ():
        for metric, of_first in first.metrics.items() if every or first.group is None else ():
            shots = "" if first.few_shot is None else f", {first.few_shot}-shot"
            asked = f"{counted(first.documents, 'document')}{shots}"
            words = f"{name}, {metric}" + ("" if of_first.higher_is_better else " ↓")
            rows.append((words, "original", _with_error(of_first.original, of_first.original_stderr), NOTHING))
            for one in scored:
                found = one.tasks[name].metrics[metric]
                value = _with_error(found.candidate, found.candidate_stderr)
                rows.append((asked if one is scored[0] else "", one.name, value, _interval(found.difference)))
    headings = ("task", "model", "score", "less the original's")
    note = "Scores with their standard errors; differences are paired by document; ↓ lower is better."
    return Table("Tasks", headings, tuple(rows), note) if rows else None


def _interval(found: "Interval") -> str:
    estimate, low, high = (number(value, 3) for value in (found.estimate, found.low, found.high))
    return f"{estimate} [{low}, {high}]"


def _with_error(value: float, error: float | None) -> str:
    return number(value) + ("" if error is None else f" ± {number(error, 2)}")
