"""Tasks of lm-evaluation-harness: the scores are those of the harness' own adapter, and candidates are paired."""

import json
from dataclasses import replace
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA, add_tokenizer, full_model, make_dense, make_pico_r1
from click.testing import CliRunner
from harness_tasks import TASKS, write_tasks
from shapes import SMALLEST
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason='pip install "dsquant[tasks]", 340 MB')

import dsquant
from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.calibration.tokenizer import encode
from dsquant.cli import main
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.code.generation import resident_model
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.harness.measure_tasks import measure_tasks
from dsquant.evaluation.harness.task_plan import TaskPlan, plan_tasks
from dsquant.evaluation.opening import Original, open_candidate, open_original
from dsquant.evaluation.request import EvaluationRequest

# Third parties' imports and files, while tasks are read.
pytestmark = pytest.mark.filterwarnings("ignore")
LITTLE: dict[str, Any] = {"texts": ["code"], "samples": 2, "seq_len": 32, "prompts": "none", "progress": False}
ENOUGH = 2**40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate that is another model of nano_r1's shapes."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("other") / "other", seed=1, **SMALLEST))


def planned(original: Original, *tasks: Path | str, memory_bytes: int = ENOUGH, **options: Any) -> TaskPlan:
    request = EvaluationRequest.checked(reference="a", candidates=["b"], tasks=list(tasks), **options)
    plan = plan_tasks(request, original, memory_bytes)
    assert plan is not None
    return plan


def compare_with_the_harness(folder: Path, files: dict[str, Path]) -> None:
    """Compares answers and scores with those of the harness' own adapter around transformers' whole model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    original = open_original(str(folder), torch.device("cpu"))
    plan, weights = planned(original, *files.values()), original.checkpoint.weights
    models = ComparedModels(original.skeleton, weights, {"same": weights})
    scores = measure_tasks(models, original.tokenizer, plan)["same"]
    theirs = HFLM(full_model(folder, weights), tokenizer=original.tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_defaults=False)
    told = simple_evaluate(theirs, tasks=list(map(str, files.values())), task_manager=manager, bootstrap_iters=0)
    assert told is not None
    for name in files:
        for metric, found in scores[name].metrics.items():
            assert found.original == pytest.approx(told["results"][name][f"{metric},none"], rel=1e-4), (name, metric)
            assert found.candidate == found.original and found.difference.estimate == 0
        answers = [request.resps[0] for request in plan.tasks[name].task.instances]
        expected = [response[0] for sample in told["samples"][name] for response in sample["resps"]]
        if name == "continued":
            assert answers == expected and any(answers)
        elif name == "whole":
            assert answers == pytest.approx(expected, rel=1e-5)
        else:
            assert [one[0] for one in answers] == pytest.approx([one[0] for one in expected], rel=1e-4)
            assert [one[1] for one in answers] == [one[1] for one in expected]


def test_answers_and_scores_are_those_of_the_harness_own_adapter(nano_r1: Path, files: dict[str, Path]) -> None:
    compare_with_the_harness(nano_r1, files)


@pytest.mark.slow
def test_they_are_for_a_dense_model_whose_context_is_shorter_than_the_texts(tmp_path: Path) -> None:
    folder = add_tokenizer(make_dense(tmp_path / "llama", {**LLAMA, "max_position_embeddings": 48}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = tokenizer.id_to_token(0)  # as Llama's and DeepSeek's tokenizers put it before a text
    tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert encode("a", load_tokenizer(folder))[0] == 0
    compare_with_the_harness(folder, write_tasks(tmp_path / "tasks", documents=16))


def test_a_candidate_is_paired_with_the_original_and_stands_in_every_report(
    nano_r1: Path, other: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates:\n- {metric: task_drop, task: letters, at_most: 1.0}\n")
    named = [f"{files['choice']},{files['letters']}", files["whole"]]
    found = dsquant.evaluate(
        nano_r1, other, tasks=named, task_samples=5, gates=gates, output=tmp_path / "report", **LITTLE
    )
    tasks = found.candidates[0].tasks
    assert list(tasks) == ["choice", "letters", "whole"]
    assert (tasks["choice"].documents, tasks["choice"].documents_in_all, tasks["choice"].few_shot) == (5, 6, 1)
    for task in tasks.values():
        for one in task.metrics.values():
            assert one.difference.estimate == pytest.approx(one.candidate - one.original)
            assert one.difference.low <= one.difference.estimate <= one.difference.high
            assert one.difference.units == 5
    perplexity = tasks["whole"].metrics["word_perplexity"]
    assert not perplexity.higher_is_better and perplexity.candidate != perplexity.original
    assert perplexity.drop == perplexity.difference
    assert [(gate.text, gate.unit) for gate in found.candidates[0].gates] == [("letters", "documents")]
    assert any("first documents were asked: choice 5 of 6" in caveat for caveat in found.caveats)
    stored = json.loads((tmp_path / "report" / "report.json").read_text())["candidates"][0]["tasks"]
    assert stored["letters"]["metrics"]["acc"]["candidate"] == tasks["letters"].metrics["acc"].candidate
    for name in ("report.md", "report.html"):
        assert "choice, acc_norm" in (tmp_path / "report" / name).read_text()


def test_json_is_all_that_is_printed(nano_r1: Path, files: dict[str, Path]) -> None:
    options = ["--text", "code", "--samples", "1", "--seq-len", "16", "--prompts", "none", "--json"]
    asked = ["eval", str(nano_r1), str(nano_r1), "--tasks", str(files["continued"]), "--task-samples", "1"]
    result = CliRunner().invoke(main, [*asked, *options])
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout)["candidates"][0]["tasks"]["continued"]["documents"] == 1


def test_a_signal_is_obeyed_between_batches_and_tokens_and_leaves_no_weights(
    nano_r1: Path, files: dict[str, Path]
) -> None:
    original = open_original(str(nano_r1), torch.device("cpu"))
    plan, weights = planned(original, files["letters"], files["continued"]), original.checkpoint.weights
    seen: list[tuple[int, int, str]] = []

    def stop_at(last: int) -> Any:
        def safe_point(done: int, total: int, what: str) -> None:
            seen.append((done, total, what))
            if len(seen) == last:
                raise KeyboardInterrupt

        return safe_point

    models = ComparedModels(original.skeleton, weights, {"same": weights})
    for last in (1, 3):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            measure_tasks(models, original.tokenizer, plan, safe_point=stop_at(last))
        assert len(seen) == last and all(parameter.is_meta for parameter in original.skeleton.model.parameters())
    seen.clear()
    measure_tasks(models, original.tokenizer, plan, safe_point=stop_at(-1))
    assert seen[0] == (18, 48, "original") and seen[-1] == (48, 48, "same")


def test_what_cannot_be_asked_is_refused_before_models_run(nano_r1: Path, tmp_path: Path) -> None:
    original = open_original(str(nano_r1), torch.device("cpu"))

    def refused(error: type[Exception], words: str, change: dict[str, Any], **options: Any) -> None:
        files = write_tasks(tmp_path / "changed", **change)
        with pytest.raises(error, match=words):
            planned(original, files["letters"], **options)

    refused(UsageError, "task letters runs code that a model writes", {"unsafe_code": True})
    refused(
        InputError, "letters.yaml: its configuration or dataset cannot be read", {"dataset_kwargs": {"data_files": "x"}}
    )
    refused(InputError, "letters.yaml: .*no_such_field", {"doc_to_text": "{{no_such_field + 1}}"})
    refused(UsageError, "asks for answers of 100000 tokens; the model's context is", {
        "output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": {"max_gen_toks": 100_000},
        "metric_list": [{"metric": "exact_match"}],
    })  # fmt: skip
    refused(
        UsageError, "--tasks needs models in memory, and a model takes .* raise --memory-budget", {}, memory_bytes=1
    )
    files = write_tasks(tmp_path / "twice")
    with pytest.raises(UsageError, match="the task letters is there already"):
        planned(original, files["letters"], write_tasks(tmp_path / "again")["letters"])
    files["choice"].write_text("group: both\ntask: [choice]\n")
    with pytest.raises(UsageError, match=r"choice\.yaml': it holds a group"):
        planned(original, files["choice"])
    with pytest.raises(InputError, match=r"missing\.yaml': no such file"):
        planned(original, "missing.yaml")


@pytest.mark.slow
def test_names_of_the_harness_are_known_and_near_ones_are_suggested(nano_r1: Path) -> None:
    original = open_original(str(nano_r1), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"knows no such task; did you mean .*arc_easy"):
        planned(original, "arc_easi")
    for name in ("humaneval", "mbpp"):
        with pytest.raises(UsageError, match="runs code that a model writes"):
            planned(original, name)


@pytest.mark.slow
@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_has_the_mean_that_the_harness_gives_it(
    nano_r1: Path, other: Path, tmp_path: Path, by_size: bool
) -> None:
    from lm_eval.api.group import Group
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    longer, shorter = write_tasks(tmp_path / "longer"), write_tasks(tmp_path / "shorter", documents=3)
    original = open_original(str(nano_r1), torch.device("cpu"))
    plan = planned(original, longer["choice"], shorter["letters"])
    tasks = {name: one.task for name, one in plan.tasks.items()}
    mean = [{"metric": "acc", "weight_by_size": by_size}]
    group = Group.from_config({"group": "both", "aggregate_metric_list": mean})
    for task in tasks.values():
        group.add(task)
    plan = replace(plan, groups={"both": group})
    weights, others = original.checkpoint.weights, open_original(str(other), torch.device("cpu")).checkpoint.weights
    models = ComparedModels(original.skeleton, weights, {"other": others})
    scores = measure_tasks(models, original.tokenizer, plan)["other"]
    theirs = HFLM(full_model(nano_r1, weights), tokenizer=original.tokenizer, batch_size=2, device="cpu")
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)
    told = evaluate(theirs, {"tasks": tasks, "groups": {"both": group}})
    both = scores["both"].metrics["acc"]
    assert both.original == pytest.approx(told["results"]["both"]["acc,none"])
    assert both.original_stderr == pytest.approx(told["results"]["both"]["acc_stderr,none"])
    parts = [scores[name] for name in tasks]
    weights_of_parts = (6 / 9, 3 / 9) if by_size else (1 / 2, 1 / 2)
    differences = [one.main.difference.estimate for one in parts]
    assert both.difference.estimate == pytest.approx(sum(map(mul, weights_of_parts, differences)))
    assert both.difference.low < both.difference.estimate < both.difference.high
    assert [one.group for one in (*parts, scores["both"])] == ["both", "both", None]


@pytest.mark.slow
def test_log_likelihoods_of_a_gguf_file_are_those_of_the_streamed_forward(tiny_r1: Path, tmp_path: Path) -> None:
    """Activations are rounded in front of every linear and of the head, as llama.cpp does."""
    from dsquant.evaluation.harness.harness_model import HarnessModel

    out = dsquant.gguf(tiny_r1, output=tmp_path / "q4", calibration="none", evaluate=False, progress=False)
    original = open_original(str(tiny_r1), torch.device("cpu"))
    weights = open_candidate(str(out.output), original).weights
    tokens_NT = held_out_tokens("code", original.tokenizer, 40, 3)
    models = ComparedModels(original.skeleton, original.checkpoint.weights, {"q4": weights})
    streamed_N = -compare(models, tokens_NT, tmp_path)["q4"].nll_candidate_NT.sum(1)
    with resident_model(original.skeleton, weights) as network, torch.no_grad():
        model = HarnessModel(network, original.tokenizer, 64, lambda answered: None)
        found = model._loglikelihood_tokens([(None, row[:1], row[1:]) for row in tokens_NT.tolist()])
    assert [score for score, _ in found] == pytest.approx(streamed_N.tolist(), rel=1e-5)


def test_the_tasks_of_these_tests_are_of_every_kind() -> None:
    kinds = {task["output_type"] for task in TASKS.values()}
    assert kinds == {"multiple_choice", "generate_until", "loglikelihood_rolling"}
