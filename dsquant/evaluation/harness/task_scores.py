"""Scores of a candidate in the tasks of lm-evaluation-harness: a part of `results`."""

from collections.abc import Mapping
from dataclasses import dataclass

from dsquant.evaluation.intervals import Interval


@dataclass(frozen=True)
class MetricScores:
    """One metric of a task, or of a group of tasks."""

    original: float
    original_stderr: float | None
    """None where the harness names none: of one document, or of a group whose tasks have none."""
    candidate: float
    candidate_stderr: float | None
    difference: Interval
    """The candidate's value less the original's, paired by document; `units` are documents."""
    higher_is_better: bool

    @property
    def drop(self) -> Interval:
        """What the candidate lost: positive where it is worse."""
        found = self.difference
        return Interval(-found.estimate, -found.high, -found.low, found.units) if self.higher_is_better else found


@dataclass(frozen=True)
class TaskScores:
    """A candidate against the original in one task, or in a group of tasks."""

    documents: int
    """Documents that were asked."""
    documents_in_all: int
    few_shot: int | None
    """Examples before each question; None where the tasks of a group differ."""
    version: str
    """The task's version in the harness."""
    group: str | None
    """The group whose mean this task is a part of."""
    metrics: Mapping[str, MetricScores]
    """Metric -> its scores, as the harness names them; one of a filter other than `none` is `metric,filter`."""

    @property
    def main(self) -> MetricScores:
        """The task's first metric."""
        return next(iter(self.metrics.values()))
