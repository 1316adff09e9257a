"""Implements `dsquant run`: does the stages of a recipe that are not done yet, and publishes.

Next to OUTPUT lies `.OUTPUT.dsquant`: the lock, the journal, and the folder that is being built. A run that was killed
anywhere continues when the same recipe is run again; the published bytes are those of an uninterrupted run.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.errors import DsquantError, GateError, InconclusiveError, InputError, Interrupted, UsageError
from dsquant.files.disk import remove_empty, sync_folder, write_atomically
from dsquant.files.sealing import RELEASE_FILE, hash_files, seal
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.jobs.journal import Journal
from dsquant.jobs.locks import HOLDER_FILE, LOCK_FILE, exclusive
from dsquant.jobs.stopping import stop_on_signals
from dsquant.options import format_size
from dsquant.releases.input_state import inputs_of, key_of
from dsquant.releases.publication import (
    RELEASE_VERSION,
    check_publishable,
    is_complete,
    publish,
    published_folder,
    published_release,
)
from dsquant.releases.recipe import EVALUATION_FOLDER, WITHOUT_INFLUENCE, ReleaseRecipe
from dsquant.reporting.notebook import Shown, table_of
from dsquant.reporting.progress import Report, silent

JOURNAL_FILE = "journal.jsonl"
BUILD_FOLDER = "build"


@dataclass(frozen=True)
class Release(Shown):
    """A published run."""

    output: Path
    """Where to read it: the output folder, or its link `current`."""
    key: str
    """Hash of recipe and inputs."""
    outputs: dict[str, dict[str, Any]]
    """Step -> folders, bytes and warnings."""
    evaluation: dict[str, Any]
    """Output -> its distance from the original; empty without evaluation."""
    gates: dict[str, Any]
    """Outcomes of the gates; empty without gates."""
    already_published: bool

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**vars(self), "output": str(self.output)}

    def tables(self) -> Iterator[Any]:
        """Yields the table of outputs, then distances, gates and warnings."""
        from rich.text import Text

        if self.already_published:
            yield Text(f"{self.output} is published already, and nothing has changed since; nothing to do")
        table = table_of(str(self.output), ("output", "folder", "size"), left=2, title_justify="left")
        for step, made in self.outputs.items():
            for name, folder in made["folders"].items():
                table.add_row(f"{step}: {name}", folder, format_size(made["bytes"][name]))
        yield table
        if self.evaluation:
            texts = list(next(iter(self.evaluation.values())))
            distances = self.evaluation.items()
            rows = ((name, *(f"{found[text]['mean_kl']:.4f}" for text in texts)) for name, found in distances)
            yield table_of("mean KL against the original, nats a token", ("output", *texts), rows)
            yield Text(f"The full comparison: {self.output / EVALUATION_FOLDER / 'report.html'}")
        yield from (Text(line) for line in self.gates.get("outcomes", ()))
        for step, made in self.outputs.items():
            yield from (Text(f"Note: {step}: {warning}.") for warning in made["warnings"])


def run_recipe(recipe: ReleaseRecipe, report: Report = silent, recipe_name: str = "") -> Release:
    """Runs a recipe and returns what is published; `recipe_name` is its file, for `on_failure`'s command.

    Raises UsageError where the recipe cannot work; InputError where model, texts or output cannot be used, or another
    run works on the output; GateError or InconclusiveError where a gate failed or is inconclusive, with nothing
    published; Interrupted where the run was stopped: running the same recipe continues it.
    """
    inputs = inputs_of(recipe)
    key = key_of(recipe.hash, inputs)
    check_publishable(recipe)
    work = _work_folder(recipe)
    missing = [folder for folder in work.parents if not folder.exists()]
    with exclusive(work, recipe.output):
        if _is_published(recipe, key):  # by the run that held the lock until now
            _tidy(work)
            return _release(recipe, key, already_published=True)
        stage = ["prepare"]
        try:
            _run(recipe, inputs, work, report, stage)
        except Exception as error:
            _after_failure(recipe, recipe_name, work, stage[-1], error)
            if isinstance(error, InputError | UsageError) and not _has_outputs(work):
                shutil.rmtree(work)
                remove_empty(missing)
            if isinstance(error, Interrupted):
                words = str(error).replace("continue with --resume", "run the same recipe again to continue")
                raise Interrupted(f"{stage[-1]}: {words}") from error
            if isinstance(error, GateError | InconclusiveError) and _has_outputs(work):
                raise type(error)(f"{error}\n{_unpublished(work)}") from error
            raise
    return _release(recipe, key, already_published=False)


def published(recipe: ReleaseRecipe) -> Release | None:
    """Returns the release that a recipe has published already, if nothing has changed since; imports no torch.

    None where there is something to do, if only to remove what a killed run left. Raises InputError where the source is
    neither here nor on the hub.
    """
    key = key_of(recipe.hash, inputs_of(recipe))
    if not _is_published(recipe, key) or _left_behind(_work_folder(recipe)):
        return None
    return _release(recipe, key, already_published=True)


def _work_folder(recipe: ReleaseRecipe) -> Path:
    """Returns the folder next to the output itself, where a link names that: renames stay on its disk."""
    output = recipe.output.resolve()
    return output.parent / f".{output.name}.dsquant"


def _is_published(recipe: ReleaseRecipe, key: str) -> bool:
    found = published_release(recipe)
    return found is not None and found.get("key") == key


def _release(recipe: ReleaseRecipe, key: str, already_published: bool) -> Release:
    record = published_release(recipe)
    assert record is not None
    stages = record["stages"]
    outputs = {step.name: stages[f"quantize {step.name}"] for step in recipe.quantize}
    return Release(
        published_folder(recipe), key, outputs, stages.get("evaluate", {}), stages.get("gate", {}), already_published
    )


def _run(recipe: ReleaseRecipe, inputs: dict[str, Any], work: Path, report: Report, entered: list[str]) -> None:
    """Does every stage that is not in the journal; `entered` gets the names of those that begin."""
    from dsquant.releases.stages import Workshop, check_all, stages_of

    key, build, journal = key_of(recipe.hash, inputs), work / BUILD_FOLDER, Journal(work / JOURNAL_FILE)
    if _is_left_over(recipe, journal):
        _tidy(work)
        journal = Journal(work / JOURNAL_FILE)
    if is_complete(recipe, key):  # killed before the link was switched, or an earlier recipe
        publish(recipe, None, key)
        _tidy(work)
        return
    build.mkdir(exist_ok=True)
    shop = Workshop(recipe, inputs, build, journal, report)
    stages = stages_of(shop)
    if not journal.units:  # what was begun had been checked
        check_all(shop)
    with stop_on_signals() as request:
        for stage in stages:
            entered.append(stage.name)
            if journal.units.get(stage.name, {}).get("key") == stage.key:
                continue
            begun = journal.units.get(f"begin {stage.name}", {}).get("key") == stage.key
            if not begun:
                journal.append(f"begin {stage.name}", key=stage.key)
            request.safe_point()
            journal.append(stage.name, key=stage.key, result=stage.work(begun))
        request.safe_point()
        entered.append("publish")
        _remove_foreign(recipe, build)
        results = {stage.name: journal.units[stage.name]["result"] for stage in stages}
        record = {
            "release_version": RELEASE_VERSION,
            "key": key,
            "recipe": recipe.model_dump(mode="json", exclude=set(WITHOUT_INFLUENCE)),
            "recipe_sha256": recipe.hash,
            "inputs": inputs,
            "stages": results,
            "files": hash_files(build, _unrecorded(build), lambda _: request.safe_point()),
        }
        write_atomically(build / RELEASE_FILE, seal(record))
        journal.append("publish", key=key)
        publish(recipe, build, key)
        _tidy(work)


def _has_outputs(work: Path) -> bool:
    """Returns whether a step has left something that the next run can continue."""
    return (work / BUILD_FOLDER).is_dir() and any((work / BUILD_FOLDER).iterdir())


def _unpublished(work: Path) -> str:
    return (
        f"nothing is published; the outputs are in {work / BUILD_FOLDER}. Run the recipe again with other gates or "
        "other samples of `evaluate`: what is quantized is not made again"
    )


def _unrecorded(build: Path) -> list[str]:
    """Returns the files of a finished folder that no output's record lists: those records, and the reports."""
    outputs = {path.parent for path in build.glob(f"*/{RECORD_FILE}")}
    below = [path for folder in build.iterdir() if folder not in outputs for path in folder.rglob("*")]
    files = [*(folder / RECORD_FILE for folder in outputs), *(path for path in below if path.is_file())]
    return sorted(str(path.relative_to(build)) for path in files)


def _tidy(work: Path) -> None:
    """Removes everything but the lock. The journal goes first: what it lists must exist as long as it does."""
    (work / JOURNAL_FILE).unlink(missing_ok=True)
    sync_folder(work)
    for path in _left_behind(work):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _left_behind(work: Path) -> list[Path]:
    """Returns what lies in the folder besides the lock."""
    return [path for path in work.glob("*") if path.name not in (LOCK_FILE, HOLDER_FILE)]


def _is_left_over(recipe: ReleaseRecipe, journal: Journal) -> bool:
    """Returns whether a run was killed after it had published and before it had cleaned up."""
    entry = journal.units.get("publish")
    return entry is not None and (published_release(recipe) or {}).get("key") == entry["key"]


def _remove_foreign(recipe: ReleaseRecipe, build: Path) -> None:
    """Removes what steps of an earlier version of the recipe left in the folder that will be published."""
    wanted = {step.name for step in recipe.quantize} | ({EVALUATION_FOLDER} if recipe.evaluate else set())
    for path in build.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _after_failure(recipe: ReleaseRecipe, recipe_name: str, work: Path, stage: str, error: Exception) -> None:
    """Does what `on_failure` says. What an interruption has left is always kept: the next run continues from there."""
    exit_code = error.exit_code if isinstance(error, DsquantError) else 1
    if recipe.on_failure.outputs == "remove" and not isinstance(error, Interrupted):
        _tidy(work)
    if recipe.on_failure.command:
        told = {
            "DSQUANT_RECIPE": recipe_name,
            "DSQUANT_OUTPUT": str(recipe.output),
            "DSQUANT_STAGE": stage,
            "DSQUANT_ERROR": str(error),
            "DSQUANT_EXIT_CODE": str(exit_code),
        }
        subprocess.run(recipe.on_failure.command, shell=True, env=os.environ | told, check=False)
