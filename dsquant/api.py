"""The Python API: each command as a function. Heavy imports happen in the calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.deployment.hardware import PlanOptions
from dsquant.errors import UsageError
from dsquant.evaluation.answer_request import AnswerOptions, AnswerRequest
from dsquant.evaluation.request import EvaluationRequest
from dsquant.options import documented, taken
from dsquant.recipes import AwqOptions, GgufOptions, Recipe, gguf_recipe
from dsquant.running import Again, DeltaOptions, Metrics, Push

if TYPE_CHECKING:
    from dsquant.deployment.forecast import Forecast
    from dsquant.deployment.inspection import Inspection
    from dsquant.evaluation.results import Evaluation
    from dsquant.incremental.applying import AppliedPatch
    from dsquant.incremental.release import Delta
    from dsquant.pipeline.result import Result
    from dsquant.releases.release_job import Release
    from dsquant.verification.checks import Verification


@documented(AwqOptions, Again, Push, Metrics)
def awq(model: str | Path = "tiny-r1", *, output: str | Path, progress: bool = True, **options: Any) -> Result:
    """Quantizes a model.

    Args:
        model: a folder, a hub id, or `tiny-r1`.
        output: folder to create.
        progress: whether to show a progress bar.
        **options: those of `dsquant awq`.

    Returns:
        Where the files are and what quantization cost; a table in a notebook.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where model, texts or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    again, push, metrics = taken(Again, options), taken(Push, options), taken(Metrics, options)
    asked = AwqOptions.checked(model=model, output=output, **options)
    recipe = Recipe.checked(**{name: getattr(asked, name) for name in asked.model_fields_set})
    return _run(recipe, again, push, metrics, progress)


@documented(GgufOptions, Again, Push, Metrics)
def gguf(model: str | Path = "tiny-r1", *, output: str | Path, progress: bool = True, **options: Any) -> Result:
    """Converts a model to GGUF files that llama.cpp runs, straight from its shards.

    Args:
        model: a folder, a hub id, or `tiny-r1`.
        output: folder to create.
        progress: whether to show a progress bar.
        **options: those of `dsquant gguf`.

    Returns:
        Where the files are and what the conversion cost; a table in a notebook.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where model, texts, imatrix or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    again, push, metrics = taken(Again, options), taken(Push, options), taken(Metrics, options)
    return _run(gguf_recipe(model=model, output=output, **options), again, push, metrics, progress)


def _run(recipe: Recipe, again: Again, push: Push, metrics: Metrics, progress: bool) -> Result:
    if again.resume and again.restart:
        raise UsageError("resume and restart exclude each other")
    from dsquant.pipeline.job import run_job
    from dsquant.pipeline.push import run_and_push
    from dsquant.reporting.prometheus import monitored
    from dsquant.reporting.terminal import progress_bar

    with progress_bar(progress) as bar, monitored(bar, **metrics.model_dump()) as report:
        return run_and_push(recipe, push.push_to, lambda: run_job(recipe, again.resume, again.restart, report))


@documented(EvaluationRequest)
def evaluate(reference: str | Path, *candidates: str | Path, progress: bool = True, **options: Any) -> Evaluation:
    """Measures what quantized models cost against the original, layer by layer.

    Args:
        reference: the original: a folder, a hub id, `tiny-r1`, or a GGUF file.
        *candidates: the same, of the same model, as FP8 or BF16, or in any format of dsquant.
        progress: whether to show a progress bar.
        **options: those of `dsquant eval`.

    Returns:
        Perplexity, KL divergence, agreement, routing, weight errors and findings of every candidate.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where a model or text cannot be used, or a candidate is not the same model.
    """
    if not candidates:
        raise UsageError("name at least one candidate")
    request = EvaluationRequest.checked(reference=reference, candidates=candidates, **options)
    from dsquant.evaluation import comparison
    from dsquant.reporting.terminal import progress_bar

    with progress_bar(progress) as report:
        return comparison.evaluate(request, report)


@documented(PlanOptions)
def plan(model: str | Path = "tiny-r1", **options: Any) -> Forecast:
    """Says what a model becomes in every format, what runs where and how fast, before a weight is read.

    Args:
        model: `tiny-r1`, a folder, a hub id (its headers are fetched, no weights), or a config.json.
        **options: those of `dsquant plan`.

    Returns:
        Sizes, memory, hours, placements and commands; tables in a notebook.

    Raises:
        InputError: where the model cannot be had, or is not of a family that dsquant knows.
        UsageError: where the machine's description cannot be read.
    """
    from dsquant.deployment.forecast import forecast

    return forecast(str(model), **options)


def run(
    recipe: str | Path,
    *,
    model: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Release:
    """Runs a recipe file: calibrate, quantize to several formats, evaluate, gate, publish.

    Args:
        recipe: a YAML file, such as recipes/tiny-r1-all.yaml.
        model: instead of the recipe's.
        output: instead of the recipe's.
        progress: whether to show a progress bar.

    Returns:
        What is published; a table in a notebook.

    Raises:
        UsageError: where the recipe is not valid.
        InputError: where model, texts or output cannot be used, or another run works on the output.
        GateError: where a gate failed; nothing is published.
        InconclusiveError: where a gate is inconclusive; nothing is published.
        Interrupted: where the run stopped; the same recipe continues it.
    """
    from dsquant.releases.recipe import read_recipe
    from dsquant.releases.release_job import published, run_recipe

    read = read_recipe(Path(recipe), None if model is None else str(model), None if output is None else Path(output))
    release = published(read)
    if release is not None:
        return release
    from dsquant.reporting.terminal import progress_bar

    with progress_bar(progress) as report:
        return run_recipe(read, report, str(recipe))


@documented(DeltaOptions)
def delta(old: str | Path, new: str | Path, *, output: str | Path, progress: bool = True, **options: Any) -> Delta:
    """Creates the output of a new release from the old release's, and the patch between the two outputs.

    Args:
        old: the old release; or its output, whose recorded hashes then stand for the release.
        new: the new release.
        output: the folder to create.
        progress: whether to show a progress bar.
        **options: those of `dsquant delta`.

    Returns:
        What changed, what was reused, and the patch's size.

    Raises:
        InputError: where a release or output cannot be used, or they do not belong together.
        UsageError: where the old output is not named, or holds GGUF files.
        Interrupted: where the job stopped and can be resumed.
    """
    asked = DeltaOptions.checked(**options)
    from dsquant.incremental import release
    from dsquant.reporting.terminal import progress_bar

    with progress_bar(progress) as report:
        return release.delta(str(old), str(new), Path(output), asked, report)


def apply_patch(
    patch: str | Path, old_output: str | Path, *, output: str | Path, progress: bool = True
) -> AppliedPatch:
    """Creates a new output from an old one and the patch that `delta` wrote.

    Args:
        patch: the patch.
        old_output: the old output.
        output: the folder to create.
        progress: whether to show a progress bar.

    Returns:
        What was created.

    Raises:
        InputError: where patch or output are damaged, or do not belong together.
    """
    from dsquant.incremental import release
    from dsquant.reporting.terminal import progress_bar

    with progress_bar(progress) as report:
        return release.apply(Path(patch), Path(old_output), Path(output), report)


def verify(
    folder: str | Path, *, source: str | Path | None = None, everything: bool = False, progress: bool = True
) -> Verification:
    """Checks every byte of an output, its coverage of the source, and its values.

    Args:
        folder: the output folder, one format's folder of it, or what `run` published.
        source: the model that it was created from; None takes the recorded one where it is on this machine.
        everything: whether every parameter is compared with the source, not a sample.
        progress: whether to show a progress bar.

    Returns:
        What was checked, the findings (file, tensor or region, problem), and what could not be checked here.

    Raises:
        InputError: where it is not a finished output of dsquant, or the source is another one.
        UsageError: where every value is asked for and the source is not there.
    """
    from dsquant.reporting.terminal import progress_bar
    from dsquant.verification import release_checks

    with progress_bar(progress) as report:
        return release_checks.verify(Path(folder), None if source is None else str(source), everything, report)


@documented(AnswerOptions)
def generate(model: str | Path, prompt: str, *, raw: bool = False, **options: Any) -> str:
    """Lets a model answer a prompt, in any format that dsquant reads, decoded to float32 in memory.

    Args:
        model: a folder, a hub id, `tiny-r1`, or a GGUF file.
        prompt: what it answers.
        raw: whether it continues the prompt as it stands, instead of answering it.
        **options: those of `dsquant generate`.

    Returns:
        What the model wrote.

    Raises:
        InputError: where the model cannot be read, or does not fit in memory.
        UsageError: where the prompt is empty or too long for the model.
    """
    request = AnswerRequest.checked(model=model, **options)
    from dsquant.evaluation.answers import resident

    with resident(request) as opened:
        if raw or not opened.tokenizer.chat_template:
            return opened.go_on(prompt)
        return opened.answer([{"role": "user", "content": prompt}])


def inspect(model: str | Path = "tiny-r1") -> Inspection:
    """Describes a checkpoint from its headers alone.

    Args:
        model: a folder, a hub id, or `tiny-r1`.

    Returns:
        Architecture, layers, tensors and bytes by kind.

    Raises:
        InputError: where it cannot be read, or is not of a family that dsquant knows.
    """
    from dsquant.deployment.inspection import describe

    return describe(str(model))
