"""Code drift from beginning to end: completions of every model, their tests where asked for, and the comparison.

A model that does not fit in memory is not generated with, since every token would read it from disk once more. Then
both models read the prompts' own completions in one streamed pass, and what is measured is how often the candidate
ranks first what the original ranks first there (teacher forcing).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsquant.calibration.tokenizer import encode
from dsquant.evaluation.code.completion_scores import code_drift, gold_of
from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.code.execution import Run, compare_runs, run_all
from dsquant.evaluation.code.generation import Completion, complete
from dsquant.evaluation.code.tasks import Task
from dsquant.evaluation.divergence import compare
from dsquant.evaluation.intervals import CONFIDENCE, DRAWS, Interval
from dsquant.model.skeleton import Skeleton
from dsquant.source.weights import Weights

SafePoint = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being done; it may raise to stop."""


@dataclass(frozen=True)
class DriftPlan:
    """How code drift is measured."""

    tasks: tuple[Task, ...]
    max_tokens: int = 64
    """The most tokens of a completion."""
    batch_prompts: int = 24
    execute: bool = False
    """Whether the completions are run with the tasks' tests; `execution` tells what that means."""
    too_large: str | None = None
    """Why nothing is generated, in words; None where the models fit in memory."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what gates can be set on."""
        if self.too_large is not None:
            return ("greedy_agreement",)
        names = ["code_exact_match", "parse_rate_drop", "loop_rate_rise"]
        if all(task.gold is not None for task in self.tasks):
            names += ["code_bleu_drop", "codebleu_drop"]
        if self.execute:
            names += ["pass_rate_drop", "accuracy_retained"]
        return tuple(names)

    @property
    def noise_batch_prompts(self) -> int:
        """The other batch size, for the noise floor."""
        return max(1, self.batch_prompts // 3)


def measure_drift(
    skeleton: Skeleton,
    original: Weights,
    candidates: Mapping[str, Weights],
    tokenizer: Any,
    plan: DriftPlan,
    work: Path,
    safe_point: SafePoint = lambda done, total, what: None,
) -> dict[str, CodeDrift]:
    """Measures the code drift of candidates against the original.

    Args:
        skeleton: the original's network, which the candidates share.
        original: its weights.
        candidates: name -> weights, with the original's parameter names; of any format.
        tokenizer: the original's.
        plan: prompts and limits.
        work: a folder for hidden states, where the models are streamed.
        safe_point: see `SafePoint`.

    Returns:
        Candidate name -> its drift.
    """
    if plan.too_large is not None:
        return _teacher_forced(skeleton, original, candidates, tokenizer, plan, work, safe_point)
    models = [
        ("original", original, plan.batch_prompts),
        ("original, other batches", original, plan.noise_batch_prompts),
        *((name, weights, plan.batch_prompts) for name, weights in candidates.items()),
    ]
    written = []
    for number, (name, weights, batch_prompts) in enumerate(models):

        def step(done: int, total: int, number: int = number, name: str = name) -> None:
            safe_point(number * total + done, len(models) * total, name)

        prompts, stops = [task.prompt for task in plan.tasks], [task.stops for task in plan.tasks]
        written.append(complete(skeleton, weights, tokenizer, prompts, stops, plan.max_tokens, batch_prompts, step))
    first, noise, *others = written
    runs = _runs(plan, [first, *others], safe_point) if plan.execute else None
    note = (
        f"greedy, at most {plan.max_tokens} tokens, {plan.batch_prompts} prompts together; noise floor: "
        f"{plan.noise_batch_prompts} together"
    )
    gold, found = gold_of(plan.tasks, tokenizer), {}
    for number, name in enumerate(candidates):
        execution, passed = None, []
        if runs is not None:
            ours, theirs = runs[1], runs[2 + number]
            execution = compare_runs(runs[0] if gold else None, ours, theirs)
            passed = [(one.outcome == "passed", two.outcome == "passed") for one, two in zip(ours, theirs, strict=True)]
        found[name] = code_drift(
            plan.tasks, gold, first, others[number], noise, execution, passed, note, plan.max_tokens
        )
    return found


def _runs(plan: DriftPlan, models: Sequence[Sequence[Completion]], safe_point: SafePoint) -> list[list[Run]] | None:
    """What became of gold's and of each model's completions of the tasks that have tests; equal programs run once."""
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
    skeleton: Skeleton,
    original: Weights,
    candidates: Mapping[str, Weights],
    tokenizer: Any,
    plan: DriftPlan,
    work: Path,
    safe_point: SafePoint,
) -> dict[str, CodeDrift]:
    tokens_NT, scored_NT = teacher_tokens(plan.tasks, tokenizer)
    scores = compare(skeleton, original, candidates, tokens_NT, work, 1, safe_point)
    note = (
        f"nothing was generated: {plan.too_large}. Both models read the prompts with their own completions; agreement "
        "is the share of places where the candidate ranks the original's greedy token first"
    )
    return {
        name: CodeDrift(
            method="teacher_forced",
            note=note,
            prompts=len(plan.tasks),
            max_tokens=plan.max_tokens,
            signatures={},
            original_vs_gold=None,
            candidate_vs_gold=None,
            candidate_vs_original=None,
            noise_floor=None,
            original=None,
            candidate=None,
            agreement=(agreement := _agreement(found.same_top_NT & scored_NT, scored_NT)),
            execution=None,
            examples=(),
            measures={"greedy_agreement": agreement},
        )
        for name, found in scores.items()
    }


def teacher_tokens(tasks: Sequence[Task], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their completions as samples of equal length; what lies behind the end is never seen or scored.

    Args:
        tasks: the prompts; one without a completion is scored itself.
        tokenizer: the model's.

    Returns:
        Tokens int64 [N, T], and bool [N, T - 1]: whether a place predicts a completion's token.
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
    """A share of places with percentiles over draws of prompts."""
    same_N, scored_N = same_NT.sum(1).numpy(), scored_NT.sum(1).numpy()
    chosen_DN = np.random.default_rng(0).integers(len(same_N), size=(DRAWS, len(same_N)))
    drawn_D = same_N[chosen_DN].sum(1) / np.maximum(1, scored_N[chosen_DN].sum(1))
    low, high = np.quantile(drawn_D, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(same_N.sum() / max(1, scored_N.sum())), float(low), float(high), len(same_N))
