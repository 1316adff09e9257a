"""Code drift from completions of tiny-r1, and what it is made of."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import full_model
from streams import plainly_rounded

from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.code.completion_scores import (
    Sides,
    code_drift,
    corpus_bleu,
    ends_in_loop,
    first_divergence,
    gold_of,
    health,
    parses,
)
from dsquant.evaluation.code.drift_plan import SHIPPED_PROMPTS, _prompts_file, plan_drift
from dsquant.evaluation.code.generation import Completion
from dsquant.evaluation.code.measure_drift import measure_drift, teacher_tokens
from dsquant.evaluation.code.tasks import DriftPlan, Task, read_tasks
from dsquant.evaluation.divergence import ComparedModels
from dsquant.evaluation.opening import Original, open_original
from dsquant.evaluation.request import DriftRequest
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

TASKS = tuple(read_tasks(_prompts_file(SHIPPED_PROMPTS)))
ENOUGH = 2**34


def completed(texts: Sequence[str], truncated: bool = False) -> list[Completion]:
    return [Completion(text, tuple(text.encode()), truncated) for text in texts]


@pytest.fixture(scope="module")
def original() -> Original:
    return open_original("tiny-r1")


@pytest.mark.slow
def test_a_candidate_that_is_the_original_has_no_drift_and_a_rounded_one_has(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    candidates = {"same": checkpoint.weights, "rounded": plainly_rounded(checkpoint.weights)}
    plan = DriftPlan(TASKS[:4], max_tokens=12, batch_prompts=4)
    models = ComparedModels(Skeleton(checkpoint), checkpoint.weights, candidates)
    found = measure_drift(models, load_tokenizer(tiny_r1), plan, tmp_path)
    same, rounded = found["same"], found["rounded"]
    assert same.candidate_vs_original is not None and rounded.candidate_vs_original is not None
    assert same.candidate_vs_original.exact_match == same.candidate_vs_original.bleu == 1
    assert same.candidate_vs_original.code_bleu.total == same.candidate_vs_original.chrf == 1
    assert same.candidate_vs_gold == same.original_vs_gold == rounded.original_vs_gold
    assert same.measures["code_bleu_drop"].estimate == same.measures["code_bleu_drop"].high == 0
    assert set(same.measures) == set(plan.measures)
    assert rounded.candidate_vs_original.bleu < 1 and rounded.candidate_vs_original.exact_match < 1
    assert same.noise_floor == rounded.noise_floor and same.execution is None


def test_teacher_forced_agreement_is_that_of_transformers_whole_model(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    candidate, tokenizer = plainly_rounded(checkpoint.weights), load_tokenizer(tiny_r1)
    plan = DriftPlan(TASKS[:5], too_large="a model takes 1 PiB")
    compared = ComparedModels(Skeleton(checkpoint), checkpoint.weights, {"c": candidate})
    drift = measure_drift(compared, tokenizer, plan, tmp_path)["c"]
    same, places = 0, 0
    models = [full_model(tiny_r1, weights) for weights in (checkpoint.weights, candidate)]
    for task in plan.tasks:
        prompt = tokenizer.encode(task.prompt)
        tokens = torch.tensor([prompt + tokenizer.encode(task.gold, add_special_tokens=False)])
        with torch.no_grad():
            tops = [model(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1) for model in models]
        same, places = same + int((tops[0] == tops[1]).sum()), places + len(tops[0])
    assert drift.method == "teacher_forced" and "1 PiB" in drift.note and drift.candidate_vs_original is None
    assert drift.agreement is not None and 0.5 < drift.agreement.estimate < 1
    assert drift.agreement.estimate == pytest.approx(same / places) and set(drift.measures) == set(plan.measures)


def test_only_completions_are_scored_and_nothing_behind_their_end(tiny_r1: Path) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    tokens, scored = teacher_tokens(TASKS[:3], tokenizer)
    for row, task in enumerate(TASKS[:3]):
        assert tokenizer.decode(tokens[row, 1:][scored[row]]) == task.gold


def test_the_interval_of_the_bleu_drop_is_around_the_difference_of_the_corpus_scores() -> None:
    gold = [task.gold or "" for task in TASKS]
    worse = ["    pass\n" if number % 3 == 0 else text for number, text in enumerate(gold)]
    tokenizer = type("Bytes", (), {"encode": staticmethod(lambda text, **_: list(text.encode()))})
    sides = Sides(gold_of(TASKS, tokenizer), completed(gold), completed(worse))
    drift = code_drift(DriftPlan(TASKS), sides)
    prefixes = [task.prefix for task in TASKS]
    exact = 100 * (corpus_bleu(gold, gold, prefixes) - corpus_bleu(worse, gold, prefixes))
    drop = drift.measures["code_bleu_drop"]
    assert drop.estimate == pytest.approx(exact) and 0 < drop.low < drop.estimate < drop.high
    assert drift.measures["code_exact_match"].estimate == pytest.approx(16 / 24)


def test_completions_without_gold_are_compared_with_the_original_alone() -> None:
    tasks = tuple(dataclasses.replace(task, gold=None) for task in TASKS[:3])
    drift = code_drift(DriftPlan(tasks), Sides(None, completed("abc"), completed("abd")))
    assert drift.original_vs_gold is None and drift.candidate_vs_original is not None
    assert drift.candidate_vs_original.exact_match == pytest.approx(2 / 3)
    assert "code_bleu_drop" not in drift.measures


def test_loops_are_told_from_repetition_that_programs_have() -> None:
    assert ends_in_loop([9, 8, *([1, 2, 3, 4] * 3)]) and ends_in_loop([7] * 12)
    assert not ends_in_loop([1, 2, 3, 4] * 2) and not ends_in_loop([7] * 11) and not ends_in_loop([])
    assert not ends_in_loop([*([1, 2, 3, 4] * 3), 5])


def test_the_first_divergence_counts_tokens_that_agree() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert first_divergence([1, 2], [1, 2, 4]) == 2
    assert first_divergence([1, 2], [1, 2]) is None


def test_a_cut_completion_is_parsed_without_its_last_line() -> None:
    task = Task("t", "def f(a):\n", None, (), None)
    assert parses(task, Completion("    return a\n    retu(", (), truncated=True))
    assert not parses(task, Completion("    return a\n    retu(", (), truncated=False))
    assert not parses(task, Completion("", (), truncated=False))
    found = health([task, task], [Completion("    pass", (1,), True), Completion("(", (1, 2, 3), False)])
    assert (found.parse_rate, found.truncation_rate, found.mean_tokens) == (0.5, 0.5, 2)


def test_code_runs_only_where_it_was_said_twice(original: Original) -> None:
    with pytest.raises(UsageError, match="--allow-code-execution"):
        plan_drift(DriftRequest(execute=True), original, ENOUGH)
    with pytest.raises(UsageError, match="nothing without --execute"):
        plan_drift(DriftRequest(allow_code_execution=True), original, ENOUGH)
    plan = plan_drift(DriftRequest(execute=True, allow_code_execution=True), original, ENOUGH)
    assert plan is not None and plan.execute and "accuracy_retained" in plan.measures


def test_a_model_that_does_not_fit_is_read_and_not_generated_with_and_that_is_said(original: Original) -> None:
    assert plan_drift(DriftRequest(), original, 2**20) is None
    plan = plan_drift(DriftRequest(prompts="python"), original, 2**20)
    assert plan is not None and plan.too_large is not None and "1.0 MiB" in plan.too_large
    with pytest.raises(UsageError, match="needs generated code"):
        plan_drift(DriftRequest(execute=True, allow_code_execution=True), original, 2**20)


def test_prompts_that_cannot_work_are_refused_before_anything_runs(original: Original, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": ')
    with pytest.raises(InputError, match="line 2"):
        plan_drift(DriftRequest(prompts=str(path)), original, ENOUGH)
    path.write_text('{"prompt": "x = 1"}\n')
    with pytest.raises(InputError, match="no prompt has a test"):
        plan_drift(DriftRequest(prompts=path, execute=True, allow_code_execution=True), original, ENOUGH)
    with pytest.raises(UsageError, match="context"):
        plan_drift(DriftRequest(prompts=path, max_tokens=10**6), original, ENOUGH)
    assert plan_drift(DriftRequest(prompts="none"), original, ENOUGH) is None
