"""How tasks are named, and what is said where lm-evaluation-harness is not installed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsquant.errors import PackageError, UsageError
from dsquant.evaluation.harness.task_plan import plan_tasks
from dsquant.evaluation.opening import open_original
from dsquant.evaluation.request import EvaluationRequest


def test_tasks_are_named_with_commas_or_one_by_one() -> None:
    def named(tasks: Any) -> tuple[str, ...]:
        return EvaluationRequest.checked(reference="a", candidates=["b"], tasks=tasks).tasks

    assert named("a,b") == named(["a", "b"]) == named(["a, b", Path("a")]) == ("a", "b")
    with pytest.raises(UsageError, match="an empty name"):
        named("a,")
    with pytest.raises(UsageError, match="--task-samples does nothing without --tasks"):
        EvaluationRequest.checked(reference="a", candidates=["b"], task_samples=3)


def test_without_the_harness_an_error_says_what_to_install(nano_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    request = EvaluationRequest.checked(reference="a", candidates=["b"], tasks="arc_easy")
    with pytest.raises(PackageError, match=r'pip install "dsquant\[tasks\]"'):
        plan_tasks(request, open_original(str(nano_r1), torch.device("cpu")), 2**40)
