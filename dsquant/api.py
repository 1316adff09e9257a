"""The Python API: each command as a function. Heavy imports happen in the calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsquant.errors import UsageError

if TYPE_CHECKING:
    from dsquant.deployment.forecast import Forecast
    from dsquant.deployment.inspection import Inspection
    from dsquant.evaluation.results import Evaluation
    from dsquant.incremental.applying import AppliedPatch
    from dsquant.incremental.release import Delta
    from dsquant.pipeline.record import Result
    from dsquant.releases.release_job import Release
    from dsquant.reporting.progress import Report
    from dsquant.verification.checks import Verification


def awq(
    model: str | Path = "tiny-r1",
    *,
    output: str | Path,
    to: str | Sequence[str] = "awq",
    bits: int = 4,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    group_size: int = 128,
    symmetric: bool | None = None,
    preset: str | None = None,
    steps: str | Sequence[str] | None = None,
    calibration: str | Path | Sequence[str | Path] = "r1-mix",
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    mtp: str = "keep",
    device: str = "auto",
    max_shard_size: str | int = "5GiB",
    memory_budget: str | int | None = None,
    gpu_memory_budget: str | int | None = None,
    evaluate: bool = True,
    resume: bool = False,
    restart: bool = False,
    progress: bool = True,
    metrics_file: str | Path | None = None,
    metrics_port: int | None = None,
    metrics_address: str | None = None,
) -> Result:
    """Quantizes a model.

    Args:
        model: a folder, a hub id, or `tiny-r1`.
        output: the folder to make.
        to: `awq`, `compressed-tensors`, `gguf:TYPE`, or several of them.
        bits: bits of a weight: 3, 4 or 8, where the format has them.
        target_bits: mean stored bits of what the preset quantizes; widths are chosen by measured sensitivity.
        target_size: the same, for the size of all tensors, such as `340GiB`.
        group_size: input channels that share a scale: 32, 64 or 128.
        symmetric: without zero points; None takes what each format's engines want.
        preset: `quality` quantizes routed experts only, `compact` every linear, `best` every linear for what the
            quantized model gives it; None is quality for mixtures.
        steps: of the quantization: some of `scales`, `clip`, `compensate`, `top-up`, `gate-weights`, `follow` and
            `descend`, or `none`; None takes the preset's.
        calibration: texts, mixes or hub sets, as on the command line.
        samples: calibration samples.
        seq_len: tokens of a sample.
        seed: of the choice of texts and of every random sum.
        mtp: `keep`, `quantize` or `drop` multi-token-prediction layers.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        max_shard_size: the most tensor data in one file, such as `5GiB`.
        memory_budget: the most resident memory, such as `16GiB`.
        gpu_memory_budget: the most GPU memory, such as `16GiB`.
        evaluate: whether the output is compared with the original at the end.
        resume: go on with an interrupted job in `output`, or begin one.
        restart: begin anew where `output` holds an interrupted or finished job.
        progress: whether to show a progress bar.
        metrics_file: a file NAME.prom for node_exporter's textfile collector.
        metrics_port: the port of a page for Prometheus, for as long as the job runs.
        metrics_address: the address that it is served on; without one only this machine reaches it.

    Returns:
        Where the files are and what quantization cost; a table in a notebook.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where model, texts or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    from dsquant.pipeline import job as pipeline
    from dsquant.recipes import Recipe

    recipe = Recipe.checked(
        model=str(model),
        output=Path(output),
        to=_several(to),
        bits=bits,
        target_bits=target_bits,
        target_size=_size(target_size),
        group_size=group_size,
        symmetric=symmetric,
        preset=preset,
        steps=steps,
        calibration=_several(calibration),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        mtp=mtp,
        device=device,
        gpu_memory_budget=_size(gpu_memory_budget),
        max_shard_bytes=_size(max_shard_size),
        memory_budget=_size(memory_budget),
        evaluate=evaluate,
    )
    with _reporting(progress, metrics_file, metrics_port, metrics_address) as report:
        return pipeline.run_job(recipe, resume, restart, report)


@contextmanager
def _reporting(
    visible: bool, metrics_file: str | Path | None, metrics_port: int | None, metrics_address: str | None
) -> Iterator[Report]:
    from dsquant.reporting.prometheus import monitored
    from dsquant.reporting.terminal import progress_bar

    file = None if metrics_file is None else Path(metrics_file)
    with progress_bar(visible) as bar, monitored(bar, file, metrics_port, metrics_address) as report:
        yield report


def _several(values: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(values),) if isinstance(values, str | Path) else tuple(str(value) for value in values)


def _size(size: str | int | None) -> int | None:
    from dsquant.recipes import parse_size

    return parse_size(size) if isinstance(size, str) else size


def gguf(
    model: str | Path = "tiny-r1",
    *,
    type: str = "Q4_K_M",
    output: str | Path,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    scales: bool = True,
    imatrix: str | Path | None = None,
    tensor_types: Sequence[str] = (),
    split_max_size: str | int = 0,
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    mtp: str = "drop",
    device: str = "auto",
    memory_budget: str | int | None = None,
    evaluate: bool = True,
    resume: bool = False,
    restart: bool = False,
    progress: bool = True,
    metrics_file: str | Path | None = None,
    metrics_port: int | None = None,
    metrics_address: str | None = None,
) -> Result:
    """Converts a model to GGUF files that llama.cpp runs, straight from its shards.

    Args:
        model: a folder, a hub id, or `tiny-r1`.
        type: a type or mixture of llama.cpp, or Q4_K_M+; with a target, of what no type is chosen for.
        output: the folder to make.
        target_bits: mean stored bits of the decoder's weights; their types are chosen by measured sensitivity.
        target_size: the same, for the size of all tensors, such as `340GiB`.
        calibration: texts to take scales and importances from; `none` for none, None for r1-mix.
        scales: whether AWQ's scales are folded in.
        imatrix: a file of importances instead of calibration.
        tensor_types: overrides `REGEX=TYPE`.
        split_max_size: the most tensor data in one file, such as `48GiB`; 0 makes one file.
        samples: calibration samples.
        seq_len: tokens of a sample.
        seed: of the choice of texts.
        mtp: `keep` or `drop` the multi-token-prediction layer.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        memory_budget: the most resident memory, such as `16GiB`.
        evaluate: whether the output is compared with the original at the end.
        resume: go on with an interrupted job in `output`, or begin one.
        restart: begin anew where `output` holds an interrupted or finished job.
        progress: whether to show a progress bar.
        metrics_file: a file NAME.prom for node_exporter's textfile collector.
        metrics_port: the port of a page for Prometheus, for as long as the job runs.
        metrics_address: the address that it is served on; without one only this machine reaches it.

    Returns:
        Where the files are and what the conversion cost; a table in a notebook.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where model, texts, imatrix or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    from dsquant.pipeline import job as pipeline
    from dsquant.recipes import gguf_recipe

    recipe = gguf_recipe(
        model=str(model),
        type=type,
        output=Path(output),
        target_bits=target_bits,
        target_size=_size(target_size),
        calibration=None if calibration is None else _several(calibration),
        scales=scales,
        imatrix=None if imatrix is None else Path(imatrix),
        tensor_types=tuple(tensor_types),
        split_max_bytes=_size(split_max_size),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        mtp=mtp,
        device=device,
        memory_budget=_size(memory_budget),
        evaluate=evaluate,
    )
    with _reporting(progress, metrics_file, metrics_port, metrics_address) as report:
        return pipeline.run_job(recipe, resume, restart, report)


def evaluate(
    reference: str | Path,
    *candidates: str | Path,
    texts: Sequence[str | Path] = (),
    prompts: str | Path | None = None,
    max_tokens: int = 64,
    execute: bool = False,
    allow_code_execution: bool = False,
    gates: str | Path | None = None,
    output: str | Path | None = None,
    samples: int = 8,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
    memory_budget: str | int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures what quantized models cost against the original, layer by layer.

    Args:
        reference: the original: a folder, a hub id, `tiny-r1`, or a GGUF file.
        *candidates: the same, of the same model: FP8, BF16, AWQ, compressed-tensors or GGUF.
        texts: shipped texts (code, wiki, reasoning) or text files; every shipped one where there are none.
        prompts: prompts for code: `python` (shipped), a .jsonl file (also HumanEval's and MBPP's), or `none`; None
            takes the shipped ones where the models fit in memory.
        max_tokens: tokens of a completion.
        execute: whether to run the completions with the prompts' tests.
        allow_code_execution: needed beside `execute`: code that a model wrote will run on this machine, under limits
            that are no security boundary.
        gates: a YAML file of limits; the outcome is in `verdict` and in each candidate's `gates`.
        output: a folder for the report.
        samples: the most samples of each text.
        seq_len: tokens of a sample.
        seed: of the intervals' random draws.
        device: `auto`, `cpu` or `cuda`.
        memory_budget: the most resident memory, such as `16GiB`.
        progress: whether to show a progress bar.

    Returns:
        Perplexity, KL divergence, agreement, routing, weight errors and findings of every candidate.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where a model or text cannot be used, or a candidate is not the same model.
    """
    from dsquant.evaluation import comparison
    from dsquant.evaluation.code.drift_plan import DriftRequest
    from dsquant.evaluation.request import EvaluationRequest
    from dsquant.recipes import parse_size
    from dsquant.reporting.terminal import progress_bar

    if not candidates:
        raise UsageError("name at least one candidate")
    request = EvaluationRequest(
        reference=str(reference),
        candidates=tuple(str(candidate) for candidate in candidates),
        texts=tuple(str(text) for text in texts),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        drift=DriftRequest(None if prompts is None else str(prompts), max_tokens, execute, allow_code_execution),
        gates=None if gates is None else Path(gates),
        output=None if output is None else Path(output),
        device=device,
        memory_budget=parse_size(memory_budget) if isinstance(memory_budget, str) else memory_budget,
    )
    with progress_bar(progress) as report:
        return comparison.evaluate(request, report)


def plan(
    model: str | Path = "tiny-r1",
    *,
    gpu: str | None = None,
    ram: str | None = None,
    disk: str | None = None,
    disk_read: str | None = None,
    gpu_price: float | None = None,
    context: int = 32768,
) -> Forecast:
    """Says what a model becomes in every format, what runs where and how fast, before a weight is read.

    Args:
        model: `tiny-r1`, a folder, a hub id (its headers are fetched, no weights), or a config.json.
        gpu: the GPUs, such as `4x24GiB` or `4x24GiB@936GB/s`.
        ram: such as `64GiB`.
        disk: room for the weights, such as `2TiB`.
        disk_read: such as `7GB/s`.
        gpu_price: of one GPU for an hour.
        context: tokens of KV cache.

    Returns:
        Sizes, memory, hours, placements and commands; tables in a notebook.

    Raises:
        InputError: where the model cannot be had, or is not of a family that dsquant knows.
        UsageError: where the machine's description cannot be read.
    """
    from dsquant.deployment.forecast import forecast

    return forecast(str(model), gpu, ram, disk, disk_read, gpu_price, context)


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
        UsageError: where the recipe cannot be meant.
        InputError: where model, texts or output cannot be used, or another run works on the output.
        GateError: where a gate failed; nothing is published.
        InconclusiveError: where a gate is undecided; nothing is published.
        Interrupted: where the run stopped; the same recipe goes on with it.
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


def delta(
    old: str | Path,
    new: str | Path,
    *,
    output: str | Path,
    quantized: str | Path | None = None,
    patch: str | Path | None = None,
    resume: bool = False,
    restart: bool = False,
    progress: bool = True,
) -> Delta:
    """Makes the output of a new release from the old release's, and the patch between the two outputs.

    Args:
        old: the old release; or its output, whose recorded hashes then stand for the release.
        new: the new release.
        output: the folder to make.
        quantized: the old output; None where `old` is it, or where it lies under its default name.
        patch: the patch to write; None is the output's name with .patch behind.
        resume: go on with an interrupted job in `output`, or begin one.
        restart: begin anew where `output` holds an interrupted or finished job.
        progress: whether to show a progress bar.

    Returns:
        What changed, what was reused, and the patch's size.

    Raises:
        InputError: where a release or output cannot be used, or they do not belong together.
        UsageError: where the old output is not named, or holds GGUF files.
        Interrupted: where the job stopped and can be resumed.
    """
    from dsquant.incremental import release
    from dsquant.reporting.terminal import progress_bar

    from_, to = (None if path is None else Path(path) for path in (quantized, patch))
    with progress_bar(progress) as report:
        return release.delta(str(old), str(new), Path(output), from_, to, resume, restart, report)


def apply_patch(
    patch: str | Path, old_output: str | Path, *, output: str | Path, progress: bool = True
) -> AppliedPatch:
    """Makes a new output from an old one and the patch that `delta` wrote.

    Args:
        patch: the patch.
        old_output: the old output.
        output: the folder to make.
        progress: whether to show a progress bar.

    Returns:
        What was made.

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
        source: the model that it was made from; None takes the recorded one where it is on this machine.
        everything: whether every parameter is compared with the source, not a sample.
        progress: whether to show a progress bar.

    Returns:
        What was checked, the findings (file, tensor or region, problem), and what could not be checked here.

    Raises:
        InputError: where it is no finished output of dsquant, or the source is another one.
        UsageError: where every value is asked for and the source is not there.
    """
    from dsquant.reporting.terminal import progress_bar
    from dsquant.verification import release_checks

    with progress_bar(progress) as report:
        return release_checks.verify(Path(folder), None if source is None else str(source), everything, report)


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
