"""Composes the stages into a job: validate, scan, calibrate, quantize layer by layer, evaluate, finish.

Nothing is written before the whole input has been found good.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from dsquant import card
from dsquant.calibration import calibration_tokens, held_out_tokens, load_tokenizer
from dsquant.conversion import Run, convert
from dsquant.errors import InputError
from dsquant.evaluation.divergence import Divergence, compare
from dsquant.gguf_conversion import (
    IMATRIX_FILE,
    GgufPlan,
    GgufRun,
    convert_to_gguf,
    plan_gguf,
    write_observed_imatrix,
)
from dsquant.jobs import (
    RECORD_FILE,
    Job,
    claim,
    full_disk_is_resumable,
    memory_guard,
    open_job,
    stop_on_signals,
    write_atomically,
)
from dsquant.model.families import family_of
from dsquant.model.skeleton import Skeleton
from dsquant.planning import BATCH_TOKENS, Plan, Target, check_complete, check_memory
from dsquant.preparation import Source, check_disk, memory_budget, open_source
from dsquant.recipe import GgufRecipe, JobRecipe, Recipe
from dsquant.source.checkpoint import Checkpoint, open_checkpoint
from dsquant.source.gguf_weights import GgufWeights, gguf_file
from dsquant.source.locate import locate
from dsquant.source.scan import scan
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import Weights
from dsquant.telemetry import Progress, Report, Stage, peak_resident_bytes, resident_bytes, silent
from dsquant.writers.base import write_index
from dsquant.writers.gguf.files import GgufFiles
from dsquant.writers.gguf.store import quantizer_name
from dsquant.writers.gguf.target import GgufTarget

# The record's layout. 1: first.
RECORD_VERSION = 1
EVALUATION_TEXTS = ("code", "wiki", "reasoning")
EVALUATION_SAMPLES = 8
EVALUATION_SEQ_LEN = 512
PACKAGES = ("dsquant", "torch", "transformers", "accelerate", "autoawq", "compressed-tensors")


@dataclass(frozen=True)
class Result:
    """What a quantization run made, and what it cost."""

    output: Path
    folders: dict[str, Path]
    """Format -> checkpoint folder."""
    source_bytes: int
    bf16_bytes: int
    """What the source would take in BF16: the 4-bit formats keep in BF16 what they do not quantize."""
    output_bytes: dict[str, int]
    """Format -> bytes of its shards."""
    divergence: dict[str, dict[str, Divergence]]
    """Format -> text -> distance from the original; empty where evaluation was off."""
    warnings: list[str]
    already_finished: bool = False
    elapsed_s: float = 0.0
    peak_resident_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "output": str(self.output),
            "folders": {name: str(folder) for name, folder in self.folders.items()},
            "divergence": {
                name: {text: vars(found) for text, found in texts.items()} for name, texts in self.divergence.items()
            },
        }


@dataclass(frozen=True)
class Evaluation:
    """How far a candidate is from a reference."""

    reference: str
    candidate: str
    texts: dict[str, Divergence]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "texts": {name: vars(found) for name, found in self.texts.items()}}


def awq(recipe: Recipe, resume: bool = False, restart: bool = False, report: Report = silent) -> Result:
    """Quantizes a model as the recipe says.

    Args:
        recipe: what to do.
        resume: go on with an interrupted job, or begin one.
        restart: begin anew where there is an interrupted or finished one.
        report: gets the progress.

    Returns:
        Where the files are, and what quantization cost.

    Raises:
        UsageError: where the recipe cannot work (memory budget, a format that cannot store it).
        InputError: where model, texts or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    started = time.monotonic()
    state = claim(recipe.output, recipe, resume, restart)
    if state == "finished":
        return _result(recipe, json.loads((recipe.output / RECORD_FILE).read_text()), already_finished=True)
    with stop_on_signals() as request, full_disk_is_resumable():
        source = open_source(recipe)
        budget = memory_budget(recipe)
        check_memory(source.plan.memory_bytes, budget, resident_bytes())
        check_disk(recipe.output, source.plan.disk_bytes)
        within_budget = memory_guard(budget, resident_bytes)

        def check() -> None:
            request.safe_point()
            within_budget()

        index = source.checkpoint.index
        notes: dict[str, Any] = {}
        if state != "resume":
            notes = {"tensors": _scan(index, report, check), "shards": _shards(index), "files": _files(source)}
        with open_job(recipe.output, recipe, state, notes) as job:
            _check_unchanged(index, job.notes, report, check)
            run = Run(recipe, source, job, report, check, _open_files(recipe, source.plan, state, job))
            try:
                convert(run)
                record = _finish(run)
            finally:
                for files in run.gguf_files.values():
                    files.close()
            job.finish()
    return _result(recipe, record, elapsed_s=time.monotonic() - started, peak_resident_bytes=peak_resident_bytes())


def _open_files(recipe: Recipe, plan: Plan, state: str, job: Job) -> dict[PurePosixPath, GgufFiles]:
    opened = {}
    for folder, target in plan.gguf.items():
        (recipe.output / folder).mkdir(exist_ok=True)
        resume = state == "resume" and bool(job.journal.units)
        opened[folder] = GgufFiles(recipe.output / folder, target.files, resume)
    return opened


def preview(recipe: Recipe, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Validates everything that headers tell and says what a run would do; writes nothing.

    Args:
        recipe: what to do.
        resume: as in `awq`.
        restart: as in `awq`.

    Returns:
        Sizes, memory and disk, as plain JSON values.

    Raises:
        UsageError: where the recipe cannot work.
        InputError: where model, texts or output folder cannot be used.
    """
    state = claim(recipe.output, recipe, resume, restart)
    source = open_source(recipe)
    budget, resident = memory_budget(recipe), resident_bytes()
    check_memory(source.plan.memory_bytes, budget, resident)
    check_disk(recipe.output, source.plan.disk_bytes)
    plan = source.plan
    return {
        "model": str(source.checkpoint.folder),
        "architecture": source.checkpoint.architecture,
        "output": str(recipe.output),
        "state": state,
        "source_bytes": source.checkpoint.index.num_bytes,
        "output_bytes": {target.format.name: target.shards.num_bytes for target in plan.targets}
        | {target.name: target.num_bytes for target in plan.gguf.values()},
        "quantized_linears": len(frozenset().union(*plan.linears.values())),
        "calibration": source.calibration,
        "memory_bytes": plan.memory_bytes + resident,
        "memory_budget_bytes": budget,
        "work_disk_bytes": plan.work_bytes,
    }


def gguf(recipe: GgufRecipe, resume: bool = False, restart: bool = False, report: Report = silent) -> Result:
    """Converts a model to GGUF files that llama.cpp loads, straight from its shards.

    Args:
        recipe: what to do.
        resume: go on with an interrupted job, or begin one.
        restart: begin anew where there is an interrupted or finished one.
        report: gets the progress.

    Returns:
        Where the files are, and what the conversion cost.

    Raises:
        UsageError: where the recipe cannot work.
        InputError: where model, texts, imatrix or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    started = time.monotonic()
    state = claim(recipe.output, recipe, resume, restart)
    if state == "finished":
        return _result(recipe, json.loads((recipe.output / RECORD_FILE).read_text()), already_finished=True)
    with stop_on_signals() as request, full_disk_is_resumable():
        plan = plan_gguf(recipe)
        budget = memory_budget(recipe)
        check_memory(plan.memory_bytes, budget, resident_bytes())
        check_disk(recipe.output, plan.disk_bytes)
        within_budget = memory_guard(budget, resident_bytes)

        def check() -> None:
            request.safe_point()
            within_budget()

        index = plan.checkpoint.index
        notes: dict[str, Any] = {}
        if state != "resume":
            notes = {"tensors": _scan(index, report, check), "shards": _shards(index), "files": _gguf_files(plan)}
        with open_job(recipe.output, recipe, state, notes) as job:
            _check_unchanged(index, job.notes, report, check)
            files = GgufFiles(recipe.output, plan.target.files, resume=state == "resume" and bool(job.journal.units))
            run = GgufRun(recipe, plan, job, report, check, files)
            try:
                convert_to_gguf(run)
                files.finish()
            finally:
                files.close()
            if plan.calibration is not None:
                write_observed_imatrix(job.work, recipe.output, plan.units, plan.calibration)
            record = _gguf_record(run, _evaluate_gguf(run) if recipe.evaluate else {})
            write_atomically(recipe.output / RECORD_FILE, _json(record))
            job.finish()
    return _result(recipe, record, elapsed_s=time.monotonic() - started, peak_resident_bytes=peak_resident_bytes())


def preview_gguf(recipe: GgufRecipe, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Validates everything that headers tell and says what a conversion would write; writes nothing.

    Args:
        recipe: what to do.
        resume: as in `gguf`.
        restart: as in `gguf`.

    Returns:
        Files, sizes, types, memory and disk, as plain JSON values.

    Raises:
        UsageError: where the recipe cannot work.
        InputError: where model, texts, imatrix or output folder cannot be used.
    """
    state = claim(recipe.output, recipe, resume, restart)
    plan = plan_gguf(recipe)
    budget, resident = memory_budget(recipe), resident_bytes()
    check_memory(plan.memory_bytes, budget, resident)
    check_disk(recipe.output, plan.disk_bytes)
    return {
        "model": str(plan.checkpoint.folder),
        "architecture": plan.checkpoint.architecture,
        "output": str(recipe.output),
        "state": state,
        "type": recipe.type,
        "source_bytes": plan.checkpoint.index.num_bytes,
        "files": {file.file_name: file.num_bytes for file in plan.target.files},
        "bytes_by_type": plan.target.bytes_by_type,
        "quantizer": quantizer_name(),
        "calibration": plan.calibration,
        "notes": list(plan.notes),
        "memory_bytes": plan.memory_bytes + resident,
        "memory_budget_bytes": budget,
        "work_disk_bytes": plan.work_bytes,
    }


def _gguf_output(target: GgufTarget, folder: PurePosixPath, journal: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the record tells of a GGUF model; `folder` is its first file, which is what llama.cpp is given."""
    hashes: dict[str, str] = {}
    for entry in journal.values():
        hashes |= entry["tensors"].get(str(folder), {})
    return {
        "folder": str(folder / target.files[0].file_name),
        "bytes": target.num_bytes,
        "files": {file.file_name: file.num_bytes for file in target.files},
        "bytes_by_type": target.bytes_by_type,
        "tensors": {name: [tensor.type_name, list(tensor.shape)] for name, tensor in target.tensors.items()},
        "tensors_sha256": hashes,
    }


def _gguf_files(plan: GgufPlan) -> list[str]:
    names = [file.file_name for file in plan.target.files] + [RECORD_FILE]
    return sorted(names + ([IMATRIX_FILE] if plan.calibration else []))


def _evaluate_gguf(run: GgufRun) -> dict[str, dict[str, Any]]:
    """Compares the files with the original on the shipped held-out texts."""
    plan = run.plan
    candidate = _open_gguf(run.job.output / plan.target.files[0].file_name, plan.checkpoint)
    candidates = {plan.target.name: candidate}
    compared = Comparison(
        plan.skeleton, plan.checkpoint.weights, candidates, run.job.work, run.batch_samples, run.safe_point
    )
    return _compare_on_texts(compared, plan.tokenizer, min(EVALUATION_SEQ_LEN, run.recipe.seq_len))


def _open_gguf(file: Path, original: Checkpoint) -> Weights:
    weights = original.weights
    return GgufWeights(file, {name: weights.shape(name) for name in weights}, original.config)


def _gguf_record(run: GgufRun, divergence: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything about the files that two runs have in common."""
    plan, journal = run.plan, run.job.journal.units
    weights = plan.checkpoint.weights
    layers = [entry["layer"] for entry in journal.values() if "layer" in entry]
    rare = sum(len(layer["topped_up"]) for layer in layers)
    warnings = list(plan.notes)
    if rare:
        warnings.append(f"{rare} experts got fewer than 256 calibration tokens; their router's next best were added")
    return {
        "record_version": RECORD_VERSION,
        "recipe": run.recipe.lasting(),
        "recipe_sha256": run.recipe.hash,
        "versions": {name: version(name) for name in (*PACKAGES, "gguf")},
        "quantizer": quantizer_name(),
        "source": {
            "architecture": plan.checkpoint.architecture,
            "bytes": plan.checkpoint.index.num_bytes,
            "bf16_bytes": 2 * sum(math.prod(weights.shape(name)) for name in weights),
            "tensors_sha256": run.job.notes["tensors"],
        },
        "calibration": plan.calibration,
        "outputs": {plan.target.name: _gguf_output(plan.target, PurePosixPath("."), journal)},
        "layers": layers,
        "divergence": divergence,
        "warnings": warnings,
        "files": _gguf_files(plan),
    }


def evaluate(
    reference: str, candidate: str, texts: list[str], seq_len: int, samples: int, report: Report = silent
) -> Evaluation:
    """Compares a candidate with a reference, layer by layer.

    Args:
        reference: the original: a folder, a hub id, or `tiny-r1`.
        candidate: a checkpoint of the same model.
        texts: text files; the shipped held-out texts where there are none.
        seq_len: tokens of a sample.
        samples: the most samples of each text.
        report: gets the progress.

    Returns:
        The distance on each text.

    Raises:
        InputError: where a model or a text cannot be used, or the two are not the same model.
        Interrupted: where a signal stopped it.
    """
    original = open_checkpoint(locate(reference))
    other = open_candidate(candidate, original)
    skeleton = Skeleton(original)
    check_complete(original, skeleton)
    _check_same_model(skeleton, candidate, other)
    tokenizer = load_tokenizer(original.folder)
    found = {}
    with stop_on_signals() as request, tempfile.TemporaryDirectory(prefix="dsquant-") as work:
        chosen = texts or list(EVALUATION_TEXTS)
        for number, text in enumerate(chosen):
            if texts:
                tokens_NT = calibration_tokens([text], tokenizer, samples, seq_len, 0).tokens
            else:
                tokens_NT = held_out_tokens(text, tokenizer, seq_len, samples)

            def safe_point(done: int, total: int, what: str, number: int = number) -> None:
                request.safe_point()
                report(Progress("evaluate", number * total + done, len(chosen) * total, what))

            scores = compare(
                skeleton,
                original.weights,
                {"candidate": other},
                tokens_NT,
                Path(work),
                max(1, BATCH_TOKENS // seq_len),
                safe_point,
            )
            found[Path(text).name] = scores["candidate"].summary()
    return Evaluation(reference, candidate, found)


def open_candidate(candidate: str, original: Checkpoint) -> Weights:
    """Opens a candidate's weights under the original's names.

    Args:
        candidate: a checkpoint's folder or hub id, a GGUF file, or a folder with one.
        original: the original.

    Returns:
        The weights, decoded on access.

    Raises:
        InputError: where it cannot be read, or is of another architecture.
    """
    file = gguf_file(Path(candidate).expanduser())
    if file is None:
        return open_checkpoint(locate(candidate)).weights
    family_of(original.folder, original.config)
    return _open_gguf(file, original)


def _check_same_model(skeleton: Skeleton, candidate: str, other: Weights) -> None:
    """Refuses a candidate whose weights are not the reference's in other storage."""
    for name, shape in skeleton.expected_shapes().items():
        if int(name.split(".")[2]) >= skeleton.num_layers if name.startswith("model.layers.") else False:
            continue  # the candidate may have dropped the MTP layer
        if name not in other:
            raise InputError(f"{candidate}: tensor {name!r} is missing, which the reference has; not the same model")
        if other.shape(name) != shape:
            raise InputError(
                f"{candidate}: tensor {name!r} has shape {list(other.shape(name))}, the reference's has "
                f"{list(shape)}; not the same model"
            )


def _check_unchanged(index: ShardIndex, notes: dict[str, Any], report: Report, check: Callable[[], None]) -> None:
    """Refuses a source that is not what it was when the job began."""
    if notes["shards"] != _shards(index) and notes["tensors"] != _scan(index, report, check):
        raise InputError(
            f"{index.folder}: the source is not what it was when the job began; restore it, or begin anew with "
            "--restart"
        )


def _scan(index: ShardIndex, report: Report, check: Callable[[], None]) -> dict[str, str]:
    done = 0

    def after_tensor(name: str) -> None:
        nonlocal done
        check()
        done += 1
        report(Progress("scan", done, len(index), name, index.bytes_read))

    return scan(index, after_tensor)


def _files(source: Source) -> list[str]:
    """Every file that the run may make, relative to the output folder."""
    names = [RECORD_FILE]
    for target in source.plan.targets:
        inside = [shard.file_name for shard in target.shards.shards]
        inside += [*card.copied_files(source.checkpoint.folder), *card.WRITTEN_FILES]
        names += [str(target.folder / name) for name in inside]
    for folder, gguf_target in source.plan.gguf.items():
        inside = [file.file_name for file in gguf_target.files]
        names += [str(folder / name) for name in (*inside, IMATRIX_FILE, RECORD_FILE)]
    return sorted(set(names))


def _shards(index: ShardIndex) -> dict[str, list[int]]:
    """Size and time of change of every source file: where these are as before, a resumed job need not hash again."""
    found = {info.path.name: info.path.stat() for info in index.values()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}


def _finish(run: Run) -> dict[str, Any]:
    """Writes what makes the shards a checkpoint, evaluates it, and writes the record last."""
    source, plan = run.source, run.source.plan
    for target in plan.targets:
        folder = run.job.output / target.folder
        card.copy_files(source.checkpoint.folder, folder)
        write_atomically(folder / card.CONFIG_FILE, _json(_config(run, target)))
        write_index(folder, target.shards)
    for gguf_folder, files in run.gguf_files.items():
        files.finish()
        write_observed_imatrix(run.job.work, run.job.output / gguf_folder, plan.units, source.calibration)
    record = _record(run, _evaluate(run) if run.recipe.evaluate else {})
    for target in plan.targets:
        folder = run.job.output / target.folder
        write_atomically(folder / card.CARD_FILE, card.model_card(record, target.format.name).encode())
        write_atomically(folder / RECORD_FILE, _json(record))
    for folder in (*(run.job.output / inside for inside in plan.gguf), run.job.output):
        write_atomically(folder / RECORD_FILE, _json(record))
    return record


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _config(run: Run, target: Target) -> dict[str, Any]:
    """The source's config.json with the target's quantization_config in place of the FP8 one."""
    source = run.source
    dropped = ("quantization_config", "auto_map")
    config = {key: value for key, value in source.checkpoint.config.items() if key not in dropped}
    layers = source.skeleton.layers
    if run.recipe.mtp == "drop" and source.skeleton.num_mtp_layers:
        config["num_nextn_predict_layers"] = 0
        layers = layers[: source.skeleton.num_layers]
    chosen = source.plan.linears[target.grid]
    linears = {linear: linear in chosen for layer in layers for linear in layer.linears}
    config["quantization_config"] = target.format.quantization_config(target.grid, linears)
    return config


def _evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """Compares every output with the original on the shipped held-out texts."""
    source = run.source
    candidates = {
        target.format.name: open_checkpoint(run.job.output / target.folder).weights for target in source.plan.targets
    }
    for folder, target in source.plan.gguf.items():
        file = run.job.output / folder / target.files[0].file_name
        candidates[target.name] = _open_gguf(file, source.checkpoint)
    compared = Comparison(
        source.skeleton, source.checkpoint.weights, candidates, run.job.work, run.batch_samples, run.safe_point
    )
    return _compare_on_texts(compared, source.tokenizer, min(EVALUATION_SEQ_LEN, run.recipe.seq_len))


@dataclass(frozen=True)
class Comparison:
    """The models that an evaluation at the end of a job compares."""

    skeleton: Skeleton
    original: Weights
    candidates: dict[str, Weights]
    work: Path
    batch_samples: int
    safe_point: Callable[[Stage, int, int, str], None]


def _compare_on_texts(models: Comparison, tokenizer: Any, seq_len: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in models.candidates}
    for number, text in enumerate(EVALUATION_TEXTS):
        tokens_NT = held_out_tokens(text, tokenizer, seq_len, EVALUATION_SAMPLES)

        def safe_point(done: int, total: int, what: str, number: int = number) -> None:
            models.safe_point("evaluate", number * total + done, len(EVALUATION_TEXTS) * total, what)

        scores = compare(
            models.skeleton,
            models.original,
            models.candidates,
            tokens_NT,
            models.work,
            models.batch_samples,
            safe_point,
        )
        for name, token_scores in scores.items():
            found[name][text] = vars(token_scores.summary())
    return found


def _record(run: Run, divergence: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything about the output that two runs have in common; times and memory are not in here."""
    source, journal = run.source, run.job.journal.units
    weights = source.checkpoint.weights
    layers = [entry["layer"] for entry in journal.values() if "layer" in entry]
    tensors: dict[str, dict[str, str]] = {}
    for entry in journal.values():
        for folder, hashes in entry["tensors"].items():
            tensors.setdefault(folder, {}).update(hashes)
    return {
        "record_version": RECORD_VERSION,
        "recipe": run.recipe.lasting(),
        "recipe_sha256": run.recipe.hash,
        "versions": {name: version(name) for name in PACKAGES},
        "source": {
            "architecture": source.checkpoint.architecture,
            "bytes": source.checkpoint.index.num_bytes,
            "bf16_bytes": 2 * sum(math.prod(weights.shape(name)) for name in weights),
            "tensors_sha256": run.job.notes["tensors"],
        },
        "calibration": source.calibration,
        "outputs": {
            target.format.name: {
                "folder": str(target.folder),
                "bytes": target.shards.num_bytes,
                "grid": vars(target.grid),
                "tensors_sha256": tensors[str(target.folder)],
            }
            for target in source.plan.targets
        }
        | {target.name: _gguf_output(target, folder, journal) for folder, target in source.plan.gguf.items()},
        "layers": layers,
        "divergence": divergence,
        "warnings": _warnings(run, layers),
        "files": _files(source),
    }


def _warnings(run: Run, layers: list[dict[str, Any]]) -> list[str]:
    """What a user should know, in words."""
    source, words = run.source, []
    wanted, got = run.recipe.samples, source.calibration["samples"]
    if got < wanted:
        words.append(
            f"the calibration texts yield {got} samples of {run.recipe.seq_len} tokens, {wanted} were asked for"
        )
    rare = sum(len(layer["topped_up"]) for layer in layers)
    if rare:
        experts = sum(len(layer["tokens_per_expert"]) for layer in layers)
        words.append(
            f"{rare} of {experts} experts got fewer than 256 calibration tokens and were judged on their router's "
            "next best as well; more --samples help"
        )
    fallbacks = sum(len(grid["fallbacks"]) for layer in layers for grid in layer["grids"])
    if fallbacks:
        words.append(f"{fallbacks} modules are plainly rounded because the search found nothing better")
    words += [note for target in source.plan.gguf.values() for note in target.notes]
    if source.skeleton.num_mtp_layers and run.recipe.mtp == "drop":
        words.append("the multi-token-prediction layer was dropped: engines cannot draft with it any more")
    return words


def _result(recipe: JobRecipe, record: dict[str, Any], **changes: Any) -> Result:
    outputs = record["outputs"]
    return Result(
        output=recipe.output,
        folders={name: recipe.output / output["folder"] for name, output in outputs.items()},
        source_bytes=record["source"]["bytes"],
        bf16_bytes=record["source"]["bf16_bytes"],
        output_bytes={name: output["bytes"] for name, output in outputs.items()},
        divergence={
            name: {text: Divergence(**values) for text, values in texts.items()}
            for name, texts in record["divergence"].items()
        },
        warnings=record["warnings"],
        **changes,
    )
