"""Quality gates: limits in a YAML file, and whether the measured intervals are inside, outside or inconclusive.

    confidence: 0.95
    gates:
      - {metric: mean_kl, at_most: 0.02}                      # on every text
      - {metric: perplexity_ratio, text: code, at_most: 1.01}
      - {metric: top1_agreement, at_least: 0.95}
      - {metric: broken_layers, at_most: 0}
      - {metric: code_bleu_drop, at_most: 0.7}                # needs --prompts
      - {metric: task_drop, task: arc_easy, at_most: 0.02}    # needs --tasks

A gate passes where the whole interval is inside its limit and fails where the whole interval is outside; in between,
more samples are needed, and the outcome states how many.
"""

import math
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsquant.errors import InputError, UsageError
from dsquant.escaping import counted
from dsquant.evaluation.intervals import CONFIDENCE, Interval, units_to_settle
from dsquant.evaluation.results import Candidate, GateOutcome, Verdict
from dsquant.files.strict_yaml import read_yaml

Bound = Literal["at_most", "at_least"]

TEXT_METRICS: dict[str, Bound] = {
    "mean_kl": "at_most",
    "mean_kl_reverse": "at_most",
    "perplexity_ratio": "at_most",
    "top1_agreement": "at_least",
    "top5_agreement": "at_least",
}
"""Of each text; the names are those of `TextScores`."""
MODEL_METRICS: dict[str, Bound] = {
    "router_overlap": "at_least",
    "layer_error": "at_most",
    "weight_error": "at_most",
    "broken_layers": "at_most",
}
"""router_overlap, layer_error (local) and weight_error (relative) are those of the worst layer or tensor."""
CODE_METRICS: dict[str, Bound] = {
    "code_bleu_drop": "at_most",
    "codebleu_drop": "at_most",
    "code_exact_match": "at_least",
    "parse_rate_drop": "at_most",
    "loop_rate_rise": "at_most",
    "pass_rate_drop": "at_most",
    "accuracy_retained": "at_least",
    "greedy_agreement": "at_least",
}
"""See `drift.CodeDrift.measures`."""
TASK_METRICS: dict[str, Bound] = {"task_drop": "at_most"}
"""Of each task or group: what the candidate loses in its first metric."""
METRICS = {**TEXT_METRICS, **MODEL_METRICS, **CODE_METRICS, **TASK_METRICS}
FORM = (
    "Write a list `gates:` of limits such as `- {metric: mean_kl, at_most: 0.02}`, each with metric, one of at_most "
    f"and at_least, and text or task if it is of one; metrics are {', '.join(METRICS)}"
)


class Gate(BaseModel):
    """One limit, on one text or task or on every one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    text: str | None = None
    task: str | None = None
    at_most: float | None = Field(default=None, allow_inf_nan=False)
    at_least: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.metric not in METRICS:
            near = get_close_matches(self.metric, METRICS, n=1)
            raise ValueError(f"unknown metric {self.metric!r}" + (f", did you mean {near[0]}?" if near else ""))
        bound = METRICS[self.metric]
        wrong = self.at_least if bound == "at_most" else self.at_most
        if getattr(self, bound) is None or wrong is not None:
            raise ValueError(f"{self.metric} needs {bound}, and nothing else, as its limit")
        if self.text is not None and self.metric not in TEXT_METRICS:
            raise ValueError(f"{self.metric} is not measured by text")
        if self.task is not None and self.metric not in TASK_METRICS:
            raise ValueError(f"{self.metric} is not measured by task")
        return self

    @property
    def bound(self) -> Bound:
        """The side of the limit."""
        return METRICS[self.metric]

    @property
    def limit(self) -> float:
        """The limit's value."""
        limit = self.at_most if self.bound == "at_most" else self.at_least
        assert limit is not None
        return limit


class Gates(BaseModel):
    """A file of gates; `confidence` is that of the intervals that decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence: float = Field(default=CONFIDENCE, gt=0.5, lt=1)
    gates: tuple[Gate, ...] = Field(min_length=1)


def read_gates(path: Path) -> Gates:
    """Reads a YAML file of gates; raises InputError with every problem in it."""
    content = read_yaml(path, "gates")
    try:
        return Gates.model_validate(content)
    except ValidationError as error:
        found = [_problem(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        problems = "; ".join(found[:-1] if len(found) > 1 and error.errors()[-1]["type"] == "too_short" else found)
        raise InputError(f"{path}: {problems}. {FORM}") from error


def _problem(where: tuple[str | int, ...], kind: str, message: str) -> str:
    """Returns a problem in the terms of this file instead of the library's."""
    words = {
        "missing": "is missing",
        "extra_forbidden": "is unknown",
        "model_type": "is not a mapping",
        "too_short": "has no limits",
    }
    place = ".".join(str(part) for part in where) or "the file"
    return f"{place} {words[kind]}" if kind in words else f"{place}: {message.removeprefix('Value error, ')}"


def check_measured(gates: Gates, texts: list[str], code_measures: Collection[str], tasks: Collection[str] = ()) -> None:
    """Refuses gates on texts or tasks that are not evaluated or code measures that are not taken, with UsageError."""
    for gate in gates.gates:
        if gate.text is not None and gate.text not in texts:
            raise UsageError(f"gate on {gate.metric}: no text {gate.text!r} is evaluated, only {', '.join(texts)}")
        if gate.metric in CODE_METRICS and gate.metric not in code_measures:
            measured = ", ".join(code_measures) or "nothing, no code is generated"
            raise UsageError(
                f"gate on {gate.metric}: this evaluation does not measure it; of code it measures {measured} "
                "(accuracy needs --execute, BLEU prompts that all have a completion)"
            )
        if gate.metric in TASK_METRICS and (not tasks or gate.task not in (None, *tasks)):
            asked = f"only {', '.join(tasks)}" if tasks else "name some with --tasks"
            raise UsageError(f"gate on {gate.metric}: no {gate.task or 'task'} is evaluated, {asked}")


def decide(gates: Gates, candidate: Candidate, units_per_sample: float) -> tuple[GateOutcome, ...]:
    """Decides every gate, on each text or task that it concerns.

    `units_per_sample` is the number of bootstrap blocks in a sample of text, to state how many samples are needed.
    """
    return tuple(
        _outcome(gate, text, found, units_per_sample)
        for gate in gates.gates
        for text, found in _measured(gate, candidate)
    )


def _measured(gate: Gate, candidate: Candidate) -> Iterator[tuple[str | None, Interval]]:
    if gate.metric in TEXT_METRICS:
        for text, scores in candidate.texts.items():
            if gate.text in (None, text):
                yield text, getattr(scores, gate.metric)
    elif gate.metric in CODE_METRICS:
        measures = {} if candidate.drift is None else candidate.drift.measures
        if gate.metric not in measures:
            raise UsageError(f"gate on {gate.metric}: this evaluation does not measure it (accuracy needs --execute)")
        yield None, measures[gate.metric]
    elif gate.metric in TASK_METRICS:
        for task, found in candidate.tasks.items():
            if gate.task == task or (gate.task is None and found.group is None):
                yield task, found.main.drop
    else:
        yield None, _of_model(gate.metric, candidate)


def _of_model(metric: str, candidate: Candidate) -> Interval:
    if metric == "router_overlap":
        overlaps = [layer.router_overlap for layer in candidate.layers if layer.router_overlap is not None]
        return min(overlaps, key=lambda one: one.estimate) if overlaps else _exact(1.0)
    if metric == "layer_error":
        return _exact(max(layer.local_error for layer in candidate.layers))
    if metric == "weight_error":
        return _exact(max((error.relative for error in candidate.weights), default=0.0))
    assert metric == "broken_layers"
    return _exact(float(len({finding.layer for finding in candidate.findings})))


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _outcome(gate: Gate, text: str | None, found: Interval, units_per_sample: float) -> GateOutcome:
    verdict = _verdict(gate, found)
    unit, per_sample = "samples", units_per_sample
    if gate.metric not in TEXT_METRICS | MODEL_METRICS:
        unit, per_sample = "prompts" if gate.metric in CODE_METRICS else "documents", 1.0
    needed = None
    if verdict == "inconclusive":
        units = units_to_settle(found, gate.limit)
        needed = None if units is None else math.ceil(units / per_sample)
    where = "" if text is None else f" on {text}"
    sign = "at most" if gate.bound == "at_most" else "at least"
    words = f"{gate.metric}{where} is {found.estimate:.4g} [{found.low:.4g}, {found.high:.4g}], {sign} {gate.limit:g}: "
    words += {"pass": "pass", "fail": "fail"}.get(verdict, "inconclusive")
    if verdict == "inconclusive":
        words += f", {_settling(found, needed, unit)}"
    return GateOutcome(gate.metric, text, gate.bound, gate.limit, found, verdict, needed, unit, words)


def _settling(found: Interval, needed: int | None, unit: str) -> str:
    if not math.isfinite(found.high - found.low):
        return f"more {unit} are needed for an interval"
    return f"{f'about {counted(needed, unit[:-1])}' if needed else f'no number of {unit}'} would settle it"


def _verdict(gate: Gate, found: Interval) -> Verdict:
    if math.isnan(found.estimate):
        return "fail"  # a candidate with scores that are NaN
    inside = found.high <= gate.limit if gate.bound == "at_most" else found.low >= gate.limit
    outside = found.low > gate.limit if gate.bound == "at_most" else found.high < gate.limit
    return "pass" if inside else "fail" if outside else "inconclusive"
