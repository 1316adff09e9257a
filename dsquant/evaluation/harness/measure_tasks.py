"""Lets every model answer the planned tasks, and pairs what candidates score with the original, document by document.

Shape legend: N documents, D draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dsquant.errors import InputError
from dsquant.evaluation.code.generation import resident_model
from dsquant.evaluation.divergence import ComparedModels, SafePoint
from dsquant.evaluation.harness.task_plan import PlannedTask, TaskPlan, quietly
from dsquant.evaluation.harness.task_scores import MetricScores, TaskScores
from dsquant.evaluation.intervals import CONFIDENCE, Interval, bootstrap_mean, paired_shares

# Of metrics that are no means, such as F1 or corpus BLEU, which the task's own function computes for each draw.
CORPUS_DRAWS = 200

Values = Mapping[int, Any]
"""Document -> what the task's metric makes of the answer."""


@dataclass(frozen=True)
class Drawing:
    """How intervals are drawn."""

    confidence: float = CONFIDENCE
    seed: int = 0


@dataclass(frozen=True)
class _Pair:
    """A metric of one task, of the original and of a candidate."""

    scores: MetricScores
    differences_N: np.ndarray | None
    """Paired by document; None where the metric is no mean."""
    shares: bool
    """Whether scores of documents are from 0 to 1."""


def measure_tasks(
    models: ComparedModels,
    tokenizer: Any,
    plan: TaskPlan,
    drawing: Drawing | None = None,
    safe_point: SafePoint = lambda done, total, what: None,
) -> dict[str, dict[str, TaskScores]]:
    """Returns candidate -> task or group -> scores. `tokenizer` is the original's.

    `safe_point` is called between batches, and between tokens that are generated, with requests done, requests in all,
    and the model's name; it may raise to stop. Raises InputError where a task cannot score an answer.
    """
    runs = [("original", models.original), *models.candidates.items()]
    per_model = sum(len(one.task.instances) for one in plan.tasks.values())
    done, found = 0, []
    for name, weights in runs:

        def note(answered: int, name: str = name) -> None:
            nonlocal done
            done += answered
            safe_point(done, len(runs) * per_model, name)

        with resident_model(models.skeleton, weights) as network, torch.no_grad():
            _answer(network, tokenizer, plan, note)
        found.append({name: _values(name, one.task) for name, one in plan.tasks.items()})
    original, *others = found
    pair = partial(_paired_tasks, plan, drawing=drawing or Drawing())
    return {name: pair(original, other) for name, other in zip(models.candidates, others, strict=True)}


def _answer(network: Any, tokenizer: Any, plan: TaskPlan, note: Callable[[int], None]) -> None:
    """Puts a model's answers into the tasks' requests, those of one kind together."""
    from dsquant.evaluation.harness.harness_model import HarnessModel

    model = HarnessModel(network, tokenizer, plan.context, note)
    requests = [request for one in plan.tasks.values() for request in one.task.instances]
    for kind in dict.fromkeys(request.request_type for request in requests):
        alike = [request for request in requests if request.request_type == kind]
        for request, answer in zip(alike, getattr(model, kind)(alike), strict=True):
            # Greedy answers are the same each time that they are asked for.
            request.resps, request.filtered_resps = [answer] * request.repeats, {}


def _values(name: str, task: Any) -> dict[str, dict[int, Any]]:
    """Returns metric -> document -> value of a task that was answered."""
    documents: dict[int, list[Any]] = {}
    for request in task.instances:
        documents.setdefault(request.doc_id, []).append(request)
    found: dict[str, dict[int, Any]] = {}
    try:
        with quietly():
            task.apply_filters()
            for kind in task.instances[0].filtered_resps:
                for number, requests in documents.items():
                    requests.sort(key=lambda request: request.idx)
                    answers = [request.filtered_resps[kind] for request in requests]
                    for metric, value in task.process_results(requests[0].doc, answers).items():
                        key = metric if kind == "none" else f"{metric},{kind}"
                        found.setdefault(key, {})[number] = value
    except Exception as error:
        raise InputError(f"task {name}: it cannot score an answer ({type(error).__name__}: {error})") from error
    return found


def _paired_tasks(
    plan: TaskPlan,
    original: Mapping[str, Mapping[str, Values]],
    candidate: Mapping[str, Mapping[str, Values]],
    drawing: Drawing,
) -> dict[str, TaskScores]:
    """Pairs all tasks of two models, and means of groups."""
    pairs = {
        name: {
            metric: _paired(one.task, metric, original[name][metric], values, drawing)
            for metric, values in candidate[name].items()
            if metric in original[name]
        }
        for name, one in plan.tasks.items()
    }
    groups = {name: _group(name, plan, pairs, drawing) for name in plan.groups}
    within = {task.task_name: name for name, group in plan.groups.items() for task in group.get_all_tasks()}
    alone = {
        name: _described([one], {metric: pair.scores for metric, pair in pairs[name].items()}, within.get(name))
        for name, one in plan.tasks.items()
    }
    return groups | alone


def _described(tasks: Sequence[PlannedTask], metrics: Mapping[str, MetricScores], group: str | None) -> TaskScores:
    shots, versions = {one.task.get_config("num_fewshot") for one in tasks}, {str(one.task.VERSION) for one in tasks}
    return TaskScores(
        documents=sum(one.documents for one in tasks),
        documents_in_all=sum(one.documents_in_all for one in tasks),
        few_shot=shots.pop() if len(shots) == 1 else None,
        version=", ".join(sorted(versions)),
        group=group,
        metrics=metrics,
    )


def _paired(task: Any, metric: str, original: Values, candidate: Values, drawing: Drawing) -> _Pair:
    """Scores one metric of both models."""
    from lm_eval.api.metrics import mean

    name = metric.partition(",")[0]
    aggregate, higher = task.aggregation().get(name, mean), bool(task.higher_is_better().get(name, True))
    shared = [number for number in original if number in candidate]
    sides = [original[number] for number in shared], [candidate[number] for number in shared]
    try:
        if aggregate is mean:
            originals_N, candidates_N = (np.asarray(side, dtype=np.float64) for side in sides)
            return _mean_pair(originals_N, candidates_N, higher, drawing)
        with quietly():
            return _Pair(_redrawn(aggregate, *sides, higher, drawing), None, False)
    except Exception as error:  # what a task's own function, or scikit-learn, makes of these values
        raise InputError(f"task {task.task_name}: {metric} cannot be computed ({error})") from error


def _mean_pair(originals_N: np.ndarray, candidates_N: np.ndarray, higher: bool, drawing: Drawing) -> _Pair:
    shares = all(((side_N >= 0) & (side_N <= 1)).all() for side_N in (originals_N, candidates_N))
    differences_N = candidates_N - originals_N
    difference = _mean_difference(differences_N, 1.0 if shares else None, drawing)
    first = float(originals_N.mean()), _error_of_mean(originals_N)
    second = float(candidates_N.mean()), _error_of_mean(candidates_N)
    return _Pair(MetricScores(*first, *second, difference, higher), differences_N, shares)


def _mean_difference(differences_N: np.ndarray, largest: float | None, drawing: Drawing) -> Interval:
    """Returns a mean over documents; `largest` is the largest difference that shares can have, None of other scores."""
    if largest is not None:
        return paired_shares(differences_N, drawing.confidence, largest)
    return bootstrap_mean(differences_N[:, None], drawing.confidence, drawing.seed, block_tokens=1, kind="signed")


def _error_of_mean(values_N: np.ndarray) -> float | None:
    return float(values_N.std(ddof=1) / np.sqrt(len(values_N))) if len(values_N) > 1 else None


def _redrawn(
    aggregate: Callable[[list[Any]], float],
    original: Sequence[Any],
    candidate: Sequence[Any],
    higher: bool,
    drawing: Drawing,
) -> MetricScores:
    """Scores a metric that is no mean: the same documents are drawn for both models, again and again."""
    estimates = float(aggregate(list(original))), float(aggregate(list(candidate)))
    documents = len(original)
    difference = Interval(estimates[1] - estimates[0], -np.inf, np.inf, documents)
    if documents < 2:
        return MetricScores(estimates[0], None, estimates[1], None, difference, higher)
    chosen_DN = np.random.default_rng(drawing.seed).integers(documents, size=(CORPUS_DRAWS, documents))
    drawn_2D = np.array(
        [[aggregate([side[at] for at in chosen_N]) for chosen_N in chosen_DN] for side in (original, candidate)]
    )
    tails = [(1 - drawing.confidence) / 2, (1 + drawing.confidence) / 2]
    low, high = np.quantile(drawn_2D[1] - drawn_2D[0], tails)
    errors = drawn_2D.std(1, ddof=1)
    difference = Interval(difference.estimate, float(low), float(high), documents)
    return MetricScores(estimates[0], float(errors[0]), estimates[1], float(errors[1]), difference, higher)


def _group(name: str, plan: TaskPlan, pairs: Mapping[str, Mapping[str, _Pair]], drawing: Drawing) -> TaskScores:
    """Scores a group as the harness does: its mean over documents, or over tasks."""
    group = plan.groups[name]
    members = {task.task_name: plan.tasks[task.task_name] for task in group.get_all_tasks()}
    with quietly():
        originals, candidates = (
            group.aggregate(_as_harness(members, pairs, of_candidate)) for of_candidate in (False, True)
        )
    weighted = {one.metric: one.weight_by_size for one in group.aggregate_metric_list}
    metrics = {}
    for key in [key for key in originals if "," in key and "_stderr," not in key]:
        metric, _, kind = key.partition(",")
        ours = metric if kind == "none" else key
        having = [pairs[task][ours] for task in members if ours in pairs[task]]
        difference = _difference_of_group(having, weighted[metric], candidates[key] - originals[key], drawing)
        error = f"{metric}_stderr,{kind}"
        metrics[ours] = MetricScores(
            original=originals[key],
            original_stderr=_number(originals.get(error)),
            candidate=candidates[key],
            candidate_stderr=_number(candidates.get(error)),
            difference=difference,
            higher_is_better=having[0].scores.higher_is_better,
        )
    return _described(list(members.values()), metrics, None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _as_harness(
    members: Mapping[str, PlannedTask], pairs: Mapping[str, Mapping[str, _Pair]], of_candidate: bool
) -> dict[str, dict[str, Any]]:
    """Returns the scores of tasks in the form that the harness' groups read."""
    found: dict[str, dict[str, Any]] = {}
    for name, one in members.items():
        found[name] = {"name": name, "alias": name, "sample_len": one.documents}
        for metric, pair in pairs[name].items():
            base, _, kind = metric.partition(",")
            scores = pair.scores
            value, error = scores.original, scores.original_stderr
            if of_candidate:
                value, error = scores.candidate, scores.candidate_stderr
            found[name][f"{base},{kind or 'none'}"] = value
            found[name][f"{base}_stderr,{kind or 'none'}"] = "N/A" if error is None else error
    return found


def _difference_of_group(pairs: Sequence[_Pair], by_size: bool, estimate: float, drawing: Drawing) -> Interval:
    """Returns the paired difference of a group; without an interval where a metric is no mean."""
    differences = [pair.differences_N for pair in pairs if pair.differences_N is not None]
    documents = sum(map(len, differences))
    if len(differences) < len(pairs):
        return Interval(estimate, -np.inf, np.inf, documents)
    # So that the mean over documents is the mean over tasks, where the group takes that.
    weights = [1.0 if by_size else documents / (len(differences) * len(one)) for one in differences]
    weighted_N = np.concatenate([one * weight for one, weight in zip(differences, weights, strict=True)])
    found = _mean_difference(weighted_N, max(weights) if all(pair.shares for pair in pairs) else None, drawing)
    return Interval(estimate, found.low, found.high, found.units)
