"""Measures code drift: completions of every model, their tests where requested, and the comparison.

A model that does not fit in memory generates nothing, since every token would read it from disk once more. Instead both
models read the prompts' own completions in one streamed pass, and the measure is how often the candidate ranks first
the token that the original ranks first (teacher forcing).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsquant.calibration.tokenizer import encode
from dsquant.evaluation.code.completion_scores import Sides, code_drift, gold_of
from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.code.execution import ProgramRun, run_all
from dsquant.evaluation.code.generation import Completion, complete
from dsquant.evaluation.code.tasks import DriftPlan, Task
from dsquant.evaluation.divergence import ComparedModels, SafePoint, compare
from dsquant.evaluation.intervals import CONFIDENCE, DRAWS, Interval


def measure_drift(
    models: ComparedModels,
    tokenizer: Any,
    plan: DriftPlan,
    work: Path,
    safe_point: SafePoint = lambda done, total, what: None,
) -> dict[str, CodeDrift]:
    """Measures the code drift of every candidate against the original.

    `tokenizer` is the original's; `work` is a folder for hidden states, where the models are streamed.
    """
    if plan.too_large is not None:
        return _teacher_forced(models, tokenizer, plan, work, safe_point)
    noise_plan = replace(plan, batch_prompts=plan.noise_batch_prompts)
    runs = [
        ("original", models.original, plan),
        ("original, other batches", models.original, noise_plan),
        *((name, weights, plan) for name, weights in models.candidates.items()),
    ]
    completions = []
    for number, (name, weights, limits) in enumerate(runs):

        def step(done: int, total: int, number: int = number, name: str = name) -> None:
            safe_point(number * total + done, len(runs) * total, name)

        completions.append(complete(models.skeleton, weights, tokenizer, limits, step))
    first, noise, *others = completions
    programs = _program_runs(plan, [first, *others], safe_point) if plan.execute else None
    gold, found = gold_of(plan.tasks, tokenizer), {}
    for number, name in enumerate(models.candidates):
        tested = None if programs is None else (programs[0] if gold else None, programs[1], programs[2 + number])
        found[name] = code_drift(plan, Sides(gold, first, others[number], noise, tested))
    return found


def _program_runs(
    plan: DriftPlan, models: Sequence[Sequence[Completion]], safe_point: SafePoint
) -> list[list[ProgramRun]] | None:
    """Runs the tests of gold's and of each model's completions; equal programs run once.

    Returns the runs of the tasks that have a test, gold's first; None where no task has one.
    """
    tested = [number for number, task in enumerate(plan.tasks) if task.test is not None]
    if not tested:
        return None
    sides = [[task.gold or "" for task in plan.tasks], *([one.text for one in model] for model in models)]
    programs = [[plan.tasks[number].program(side[number]) for number in tested] for side in sides]
    unique = list(dict.fromkeys(program for side in programs for program in side))
    found = dict(
        zip(unique, run_all(unique, lambda done, total: safe_point(done, total, "running the tests")), strict=True)
    )
    return [[found[program] for program in side] for side in programs]


def _teacher_forced(
    models: ComparedModels, tokenizer: Any, plan: DriftPlan, work: Path, safe_point: SafePoint
) -> dict[str, CodeDrift]:
    tokens_NT, scored_NT = teacher_tokens(plan.tasks, tokenizer)
    scores = compare(replace(models, batch_samples=1), tokens_NT, work, safe_point)
    return {
        name: CodeDrift(
            method="teacher_forced",
            note=plan.note,
            prompts=len(plan.tasks),
            max_tokens=plan.max_tokens,
            agreement=(agreement := _agreement(found.same_top_NT & scored_NT, scored_NT)),
            measures={"greedy_agreement": agreement},
        )
        for name, found in scores.items()
    }


def teacher_tokens(tasks: Sequence[Task], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns prompts with their completions as samples of equal length, int64 [N, T], and which places are scored.

    The scored places are bool [N, T - 1]: those that predict a completion's token, or any token of a prompt without a
    completion. Padding after the end is never seen or scored.
    """
    rows = []
    for task in tasks:
        prompt = encode(task.prompt, tokenizer)
        whole = prompt + encode(task.gold, tokenizer, add_special_tokens=False) if task.gold is not None else prompt
        rows.append((len(prompt) if task.gold is not None else 1, whole))
    width = max(len(whole) for _, whole in rows)
    tokens_NT = torch.tensor([whole + [whole[-1]] * (width - len(whole)) for _, whole in rows])
    places_T = torch.arange(1, width)
    starts_N, ends_N = (torch.tensor(ends).unsqueeze(1) for ends in zip(*((s, len(w)) for s, w in rows), strict=True))
    return tokens_NT, (places_T >= starts_N) & (places_T < ends_N)


def _agreement(same_NT: torch.Tensor, scored_NT: torch.Tensor) -> Interval:
    """Returns a share of places with percentiles over draws of prompts."""
    same_N, scored_N = same_NT.sum(1).numpy(), scored_NT.sum(1).numpy()
    chosen_DN = np.random.default_rng(0).integers(len(same_N), size=(DRAWS, len(same_N)))
    drawn_D = same_N[chosen_DN].sum(1) / np.maximum(1, scored_N[chosen_DN].sum(1))
    low, high = np.quantile(drawn_D, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(same_N.sum() / max(1, scored_N.sum())), float(low), float(high), len(same_N))
