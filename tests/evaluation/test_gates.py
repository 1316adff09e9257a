"""Gates: three outcomes, the number of samples that would settle one, and files that say what is wrong with them."""

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from pydantic import ValidationError

from dsquant.errors import GateError, InconclusiveError, InputError, UsageError
from dsquant.evaluation.bands import verdicts
from dsquant.evaluation.comparison import raise_verdict, worse_than_chance
from dsquant.evaluation.gates import Gates, check_measured, decide, read_gates
from dsquant.evaluation.harness.task_scores import MetricScores, TaskScores
from dsquant.evaluation.intervals import Interval
from dsquant.evaluation.results import Candidate, Evaluation, Finding, Ladder, TextScores

LADDER = Ladder(*(0.0,) * 11)


def scores(kl: Interval, ratio: Interval) -> TextScores:
    one = Interval(1.0, 1.0, 1.0, 64)
    return TextScores(
        tokens=4088, perplexity_original=5.0, perplexity=5.1, log_ratio=ratio, perplexity_ratio=ratio, mean_kl=kl,
        mean_kl_reverse=kl, kl=LADDER, kl_reverse=LADDER, top1_agreement=one, top5_agreement=one, delta_p=LADDER,
        delta_p_rms=0.0, kl_by_position=(),
    )  # fmt: skip


def candidate(kl: Interval, findings: tuple[Finding, ...] = ()) -> Candidate:
    return Candidate(
        name="awq", path="awq", format="AWQ", size_bytes=1, bits_per_weight=4.0, fingerprint="",
        texts=MappingProxyType({"code": scores(kl, Interval(1.01, 1.0, 1.02, 64))}), layers=(), weights=(),
        weight_error_by_kind={}, findings=findings, drift=None, gates=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "verdict", "needed"), [(0.03, "pass", None), (0.01, "fail", None), (0.021, "inconclusive", 200)]
)
def test_a_gate_passes_fails_or_says_how_many_samples_it_needs(limit: float, verdict: str, needed: int | None) -> None:
    gates = Gates.model_validate({"gates": [{"metric": "mean_kl", "at_most": limit}]})
    found = decide(gates, candidate(Interval(0.02, 0.015, 0.025, 64)), units_per_sample=8)[0]
    assert (found.verdict, found.needed, found.text) == (verdict, needed, "code")


def test_one_block_of_text_gives_no_interval_and_so_no_verdict() -> None:
    gates = Gates.model_validate({"gates": [{"metric": "mean_kl", "at_most": 0.2}]})
    short = candidate(Interval(0.007, -math.inf, math.inf, 1))
    found = decide(gates, short, units_per_sample=1)[0]
    assert found.verdict == "inconclusive" and found.message.endswith("more samples are needed for an interval")
    evaluation = Evaluation(1, None, None, (), {}, None, (short,), ())  # type: ignore[arg-type]
    assert verdicts(evaluation) == ["awq: the texts are too short for a verdict; take more --samples."]


def test_an_original_that_predicts_worse_than_chance_is_named() -> None:
    interval = Interval(0.02, 0.015, 0.025, 64)
    lost = replace(scores(interval, interval), perplexity_original=1.5e9)
    (words,) = worse_than_chance({"code": lost, "wiki": scores(interval, interval)}, 49_152)
    assert words.startswith("the original predicts worse than chance (perplexity code 1.50e+09 with 49,152 tokens)")
    assert worse_than_chance({"wiki": scores(interval, interval)}, 49_152) == []


def test_scores_that_are_no_numbers_fail() -> None:
    nan = float("nan")
    gates = Gates.model_validate({"gates": [{"metric": "mean_kl", "at_most": 100}]})
    assert decide(gates, candidate(Interval(nan, nan, nan, 64)), 8)[0].verdict == "fail"


def test_a_gate_on_a_task_is_on_what_its_first_metric_lost() -> None:
    def task(difference: float, higher_is_better: bool, group: str | None = None) -> TaskScores:
        interval = Interval(difference, difference - 0.01, difference + 0.01, 100)
        return TaskScores(
            100, 100, 0, "1", group, {"acc": MetricScores(0.5, 0.1, 0.5, 0.1, interval, higher_is_better)}
        )

    tasks = {"mean": task(-0.05, True), "part": task(-0.5, True, "mean"), "perplexity": task(0.015, False)}
    asked = replace(candidate(Interval(0.02, 0.015, 0.025, 64)), tasks=tasks)
    gates = Gates.model_validate({"gates": [{"metric": "task_drop", "at_most": 0.02}]})
    found = decide(gates, asked, 8)
    assert [(one.text, one.verdict) for one in found] == [("mean", "fail"), ("perplexity", "inconclusive")]
    assert found[0].found.estimate == 0.05 and "task_drop on mean is 0.05" in found[0].message
    assert found[1].needed == 400 and found[1].message.endswith("about 400 documents would settle it")
    one = Gates.model_validate({"gates": [{"metric": "task_drop", "task": "part", "at_most": 0.6}]})
    assert [(each.text, each.verdict) for each in decide(one, asked, 8)] == [("part", "pass")]
    check_measured(one, ["code"], (), tuple(tasks))
    with pytest.raises(UsageError, match="no part is evaluated, only mean"):
        check_measured(one, ["code"], (), ("mean",))
    with pytest.raises(UsageError, match="no task is evaluated, name some with --tasks"):
        check_measured(gates, ["code"], ())
    with pytest.raises(ValidationError, match="mean_kl is not measured by task"):
        Gates.model_validate({"gates": [{"metric": "mean_kl", "task": "part", "at_most": 0.6}]})


def test_findings_fail_the_gate_on_broken_layers() -> None:
    finding = Finding("layer", 2, "model.layers.2", 1.0, 0.2, "layer 2 is off")
    gates = Gates.model_validate({"gates": [{"metric": "broken_layers", "at_most": 0}]})
    kl = Interval(0.02, 0.015, 0.025, 64)
    assert decide(gates, candidate(kl), 8)[0].verdict == "pass"
    assert decide(gates, candidate(kl, (finding,)), 8)[0].verdict == "fail"


def test_the_worst_verdict_decides_the_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text("gates:\n- {metric: mean_kl, at_most: 0.021}\n- {metric: perplexity_ratio, at_most: 2}\n")
    inconclusive = candidate(Interval(0.02, 0.015, 0.025, 64))
    inconclusive = replace(inconclusive, gates=decide(read_gates(path), inconclusive, 8))
    failed = candidate(Interval(0.2, 0.15, 0.25, 64))
    failed = replace(failed, gates=decide(read_gates(path), failed, 8))
    evaluation = Evaluation(1, None, None, (), {}, None, (inconclusive,), ())  # type: ignore[arg-type]
    with pytest.raises(InconclusiveError, match="about 200 samples would settle it"):
        raise_verdict(evaluation)
    with pytest.raises(GateError, match=r"mean_kl on code is 0.2 .* fail"):
        raise_verdict(replace(evaluation, candidates=(inconclusive, failed)))
    assert (InconclusiveError.exit_code, GateError.exit_code) == (5, 4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("gates: []", "gates has no limits"),
        ("{}", "gates is missing"),
        ("gates:\n- {metric: mean_kul, at_most: 1}", r"unknown metric 'mean_kul', did you mean mean_kl\?"),
        ("gates:\n- {metric: mean_kl, at_least: 1}", "mean_kl needs at_most"),
        ("gates:\n- {metric: top1_agreement}", "top1_agreement needs at_least"),
        ("gates:\n- {metric: mean_kl, at_most: 1, texts: code}", "texts is unknown"),
        ("gates:\n- {metric: broken_layers, text: code, at_most: 1}", "not measured by text"),
        ("confidence: 95\ngates:\n- {metric: mean_kl, at_most: 1}", "less than 1"),
        ("gates: [", "cannot be read"),
    ],
)
def test_a_file_of_gates_says_what_is_wrong_with_it(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=f"gates.yaml: .*{problem}"):
        read_gates(path)
