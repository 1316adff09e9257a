"""Defines the stages of a run, each resumable by itself: a stage is done when its journal line is on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.jobs.journal import Journal
from dsquant.recipes import MachineOptions, Recipe, gguf_recipe, uses_texts
from dsquant.releases.evaluation import check_evaluation, decide_gates, evaluate_outputs, read_recipe_gates
from dsquant.releases.input_state import key_of
from dsquant.releases.recipe import AwqStep, GgufStep, ReleaseRecipe
from dsquant.reporting.progress import Report

if TYPE_CHECKING:
    from dsquant.evaluation.gates import Gates


@dataclass(frozen=True)
class Workshop:
    """Inputs and folders of a run until it publishes."""

    recipe: ReleaseRecipe
    inputs: dict[str, Any]
    build: Path
    """The folder that will be published."""
    journal: Journal
    report: Report


@dataclass(frozen=True)
class ReleaseStage:
    """One piece of a run."""

    name: str
    key: str
    """Hash of everything that its result depends on: a line in the journal counts only with this key."""
    work: Callable[[bool], dict[str, Any]]
    """Does the work, given whether it was begun before with this key; returns its result for the journal."""


def stages_of(shop: Workshop) -> list[ReleaseStage]:
    """Returns all stages before publishing, in order: calibrate, quantize each step, evaluate, gate."""
    recipe = shop.recipe
    source = key_of(recipe.model, shop.inputs)
    stages = []
    if any(_texts(recipe, step) for step in recipe.quantize):
        calibration = recipe.calibration.model_dump(mode="json")
        stages.append(ReleaseStage("calibrate", key_of(source, calibration), lambda _: _calibrate(shop)))
    for step in recipe.quantize:
        key = key_of(source, recipe.calibration.model_dump(mode="json"), step.model_dump(mode="json"))
        stages.append(ReleaseStage(f"quantize {step.name}", key, partial(_quantize, shop, step)))
    if recipe.evaluate is not None:
        gates = read_recipe_gates(recipe)
        confidence = None if gates is None else gates.confidence
        evaluated = key_of([stage.key for stage in stages], recipe.evaluate.model_dump(mode="json"), confidence)
        stages.append(ReleaseStage("evaluate", evaluated, partial(_evaluate, shop, gates)))
        if gates is not None:
            key = key_of(evaluated, gates.model_dump(mode="json"))
            stages.append(ReleaseStage("gate", key, partial(_gate, shop, gates)))
    return stages


def _texts(recipe: ReleaseRecipe, step: AwqStep | GgufStep) -> tuple[str, ...]:
    """Returns the texts that a step is calibrated on."""
    if isinstance(step, AwqStep):
        used = uses_texts(step.to)
    else:
        used = step.calibrate and uses_texts((f"gguf:{step.type}",), step.imatrix)
    return recipe.calibration.texts if used else ()


def _calibrate(shop: Workshop) -> dict[str, Any]:
    """Checks that the texts exist, and identifies them, before hours are spent."""
    from dsquant.pipeline.inputs import open_calibration, open_model, open_tokenizer

    checkpoint, _ = open_model(shop.recipe.model, mtp="drop")
    fields = _job_fields(shop.recipe) | {"calibration": shop.recipe.calibration.texts, "output": shop.build}
    _, found = open_calibration(Recipe.checked(**fields), open_tokenizer(checkpoint))
    return found or {}


def _job_fields(recipe: ReleaseRecipe) -> dict[str, Any]:
    """Returns the recipe fields that every job shares, without evaluation: a stage evaluates all at once."""
    shared = {name: getattr(recipe, name) for name in MachineOptions.model_fields}
    return {**recipe.calibration.model_dump(exclude={"texts"}), **shared, "model": recipe.model, "evaluate": False}


def _quantize(shop: Workshop, step: AwqStep | GgufStep, begun: bool) -> dict[str, Any]:
    from dsquant.pipeline import job as pipeline

    job = _job(shop, step)
    # An attempt of an earlier version of the recipe starts over.
    resume, restart = begun or not job.output.exists(), not begun and job.output.exists()
    result = pipeline.run_job(job, resume, restart, shop.report)
    folders = {name: str(folder.relative_to(shop.build)) for name, folder in result.folders.items()}
    return {"folders": folders, "bytes": result.output_bytes, "warnings": result.warnings}


def _job(shop: Workshop, step: AwqStep | GgufStep) -> Recipe:
    """Returns the recipe of the corresponding `dsquant awq` or `dsquant gguf`."""
    unset = {"group_size", "steps"} - step.model_fields_set  # defaults that the model may change
    fields = _job_fields(shop.recipe) | step.model_dump(exclude={"name", "calibrate", *unset})
    fields["output"] = shop.build / step.name
    fields["calibration"] = _texts(shop.recipe, step)
    return Recipe.checked(**fields) if isinstance(step, AwqStep) else gguf_recipe(**fields)


def check_all(shop: Workshop) -> None:
    """Plans every step from headers, and reads the evaluation's inputs, before the first step.

    Raises InputError where the model, a text, a prompt or a gate cannot be used, UsageError where a step cannot work or
    a gate is on something that is not measured.
    """
    from dsquant.errors import DsquantError
    from dsquant.pipeline.inputs import open_source, resolved

    for step in shop.recipe.quantize:
        try:
            job = _job(shop, step)
            open_source(resolved(job))
        except DsquantError as error:
            raise type(error)(f"step {step.name}: {error}") from error
    if shop.recipe.evaluate is not None:
        check_evaluation(shop.recipe, read_recipe_gates(shop.recipe))


def _evaluate(shop: Workshop, gates: "Gates | None", _: bool) -> dict[str, Any]:
    return evaluate_outputs(shop.recipe, gates, _folders(shop), shop.build, shop.report)


def _gate(shop: Workshop, gates: "Gates", _: bool) -> dict[str, Any]:
    return decide_gates(gates, shop.build, shop.report)


def _folders(shop: Workshop) -> dict[str, Path]:
    """Returns output -> its folder, from the journal."""
    found: dict[str, Path] = {}
    for step in shop.recipe.quantize:
        folders = shop.journal.units[f"quantize {step.name}"]["result"]["folders"]
        for name, folder in folders.items():
            found[step.name if len(folders) == 1 else f"{step.name}/{name}"] = shop.build / folder
    return found
