"""Compares every output of a run with the original, and decides the gates.

The report is published with the outputs, so it holds nothing that differs from run to run: no times, no memory, and the
outputs' names instead of the folder they were built in.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.errors import InputError
from dsquant.files.disk import write_atomically
from dsquant.releases.recipe import EVALUATION_FOLDER, AwqStep, ReleaseRecipe
from dsquant.reporting.progress import Progress, Report

if TYPE_CHECKING:
    from dsquant.evaluation.gates import Gates
    from dsquant.evaluation.request import EvaluationRequest
    from dsquant.evaluation.results import Candidate, Evaluation

# For the gates, next to the published folder: unlike the report it keeps infinite bounds.
MEASURED_FILE = "measured.json"
# The gates of the evaluation, which sets the confidence of its intervals.
GATES_FILE = "gates.json"


def read_recipe_gates(recipe: ReleaseRecipe) -> "Gates | None":
    """Reads the recipe's gates, or those of the file it names; None without gates. Raises InputError for invalid
    ones."""
    if recipe.gates is None:
        return None
    from pydantic import ValidationError

    from dsquant.evaluation.gates import Gates, read_gates

    if isinstance(recipe.gates, Path):
        return read_gates(recipe.gates)
    try:
        return Gates.model_validate(recipe.gates)
    except ValidationError as error:
        problems = (f"gates.{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise InputError("; ".join(problems)) from error


def evaluate_outputs(
    recipe: ReleaseRecipe, gates: "Gates | None", folders: Mapping[str, Path], build: Path, report: Report
) -> dict[str, Any]:
    """Compares every output with the original, and writes the report into the folder that will be published.

    `folders` maps outputs to their folder or GGUF file. Returns output -> text -> its main numbers, as plain JSON
    values.
    """
    from dsquant.evaluation.comparison import evaluate

    gates_file = None if gates is None else build.parent / GATES_FILE
    if gates is not None and gates_file is not None:  # YAML reads JSON
        write_atomically(gates_file, gates.model_dump_json().encode())
    request = _request(recipe, tuple(str(folder) for folder in folders.values()), gates_file)
    evaluation = _publishable(evaluate(request, report), {str(folder): name for name, folder in folders.items()})
    _write(evaluation, build)
    write_atomically(build.parent / MEASURED_FILE, json.dumps(dataclasses.asdict(evaluation)).encode())
    return {candidate.name: _summary(candidate) for candidate in evaluation.candidates}


def check_evaluation(recipe: ReleaseRecipe, gates: "Gates | None") -> None:
    """Refuses an evaluation that would fail, before anything is quantized for it.

    Raises InputError where the model, a text or a prompt cannot be used, UsageError where code cannot be run as
    requested or a gate is on something that is not measured.
    """
    from dsquant.evaluation.comparison_inputs import check_request
    from dsquant.formats.table import check_decoder
    from dsquant.packages import load

    load("jinja2", "jinja2")
    for step in recipe.quantize:
        for name in step.to if isinstance(step, AwqStep) else ("gguf",):
            check_decoder(name)
    check_request(_request(recipe, (), None), gates)


def _request(recipe: ReleaseRecipe, candidates: tuple[str, ...], gates_file: Path | None) -> "EvaluationRequest":
    from dsquant.evaluation.request import EvaluationRequest

    assert recipe.evaluate is not None
    return EvaluationRequest(
        **recipe.evaluate.model_dump(),
        reference=recipe.model,
        candidates=candidates,
        gates=gates_file,
        device=recipe.device,
        memory_budget=recipe.memory_budget,
    )


def _write(evaluation: "Evaluation", build: Path) -> None:
    """Replaces the reports one by one: a kill must not leave half a report of a finished stage."""
    from dsquant.evaluation.report.report_files import write_reports

    (build / EVALUATION_FOLDER).mkdir(exist_ok=True)
    for path in write_reports(evaluation, build.parent / EVALUATION_FOLDER):
        path.replace(build / EVALUATION_FOLDER / path.name)


def _publishable(evaluation: "Evaluation", names: Mapping[str, str]) -> "Evaluation":
    """Returns the evaluation without what differs from run to run."""
    identity = dataclasses.replace(evaluation.identity, elapsed_s=0.0, peak_resident_bytes=0, bytes_read=0)
    candidates = tuple(
        dataclasses.replace(candidate, name=names[candidate.path], path=names[candidate.path])
        for candidate in evaluation.candidates
    )
    return dataclasses.replace(evaluation, identity=identity, candidates=candidates)


def _summary(candidate: "Candidate") -> dict[str, Any]:
    return {
        text: {
            "perplexity_original": scores.perplexity_original,
            "perplexity": scores.perplexity,
            "mean_kl": scores.mean_kl.estimate,
            "top1_agreement": scores.top1_agreement.estimate,
        }
        for text, scores in candidate.texts.items()
    }


def decide_gates(gates: "Gates", build: Path, report: Report) -> dict[str, Any]:
    """Decides the gates on the measured evaluation, and writes the report with the outcomes.

    Returns the verdict and every outcome, in words. Raises GateError where a gate failed, InconclusiveError where none
    failed but more samples are needed, UsageError where a gate is on something that was not measured.
    """
    from dsquant.evaluation.comparison import raise_verdict
    from dsquant.evaluation.gates import check_measured, decide
    from dsquant.evaluation.intervals import BLOCK_TOKENS

    evaluation = _read_measured(build.parent / MEASURED_FILE)
    drift, tasks = evaluation.candidates[0].drift, tuple(evaluation.candidates[0].tasks)
    measures = () if drift is None else tuple(drift.measures)
    check_measured(gates, [text.name for text in evaluation.texts], measures, tasks)
    blocks_per_sample = -(-(max(text.seq_len for text in evaluation.texts) - 1) // BLOCK_TOKENS)
    candidates = tuple(
        dataclasses.replace(candidate, gates=decide(gates, candidate, blocks_per_sample))
        for candidate in evaluation.candidates
    )
    decided = dataclasses.replace(evaluation, candidates=candidates)
    _write(decided, build)
    passed: dict[str, bool] = {}
    for candidate in candidates:
        for gate in candidate.gates:
            name = " ".join(filter(None, (candidate.name, gate.metric, gate.text)))
            passed[name] = passed.get(name, True) and gate.verdict == "pass"
    report(Progress("evaluate", 1, 1, "gates", gates=passed))
    raise_verdict(decided)
    outcomes = [f"{candidate.name}: {gate.message}" for candidate in candidates for gate in candidate.gates]
    return {"verdict": decided.verdict, "outcomes": outcomes}


def _read_measured(path: Path) -> "Evaluation":
    """Reads the evaluation that the previous stage left."""
    from pydantic import TypeAdapter

    from dsquant.evaluation.results import Evaluation

    return TypeAdapter(Evaluation).validate_python(json.loads(path.read_text(encoding="utf-8")))
