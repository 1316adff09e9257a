"""Composes the stages into a job: validate, scan, calibrate, quantize layer by layer, evaluate, finish.

Nothing is written before the whole input has been found good.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any

from dsquant import card
from dsquant.conversion import Run, convert
from dsquant.disk import write_atomically
from dsquant.distributed import ALONE, Ranks
from dsquant.errors import InputError, UsageError
from dsquant.final_comparison import Comparison, compare_on_texts
from dsquant.gguf_conversion import (
    GgufRun,
    convert_to_gguf,
    plan_gguf,
    write_observed_imatrix,
)
from dsquant.jobs import (
    RECORD_FILE,
    WORK_FOLDER,
    Job,
    claim,
    found_state,
    full_disk_is_resumable,
    memory_guard,
    open_job,
    stop_on_signals,
)
from dsquant.manifest import gguf_tensors, run_tensors, write_record
from dsquant.opening import open_gguf
from dsquant.planning import Plan, Target, check_memory
from dsquant.preparation import (
    check_disk,
    gpu_memory_budget,
    gpu_within_budget,
    memory_budget,
    open_source,
    resolved,
    resolved_device,
)
from dsquant.recipe import GgufRecipe, Recipe, format_size
from dsquant.records import (
    Preview,
    Result,
    gguf_output_files,
    gguf_record,
    output_files,
    planned_warnings,
    result_of,
    run_record,
)
from dsquant.source.checkpoint import open_checkpoint
from dsquant.source.scan import scan
from dsquant.source.shards import ShardIndex
from dsquant.telemetry import (
    Limits,
    Progress,
    Report,
    Stage,
    peak_gpu_bytes,
    peak_resident_bytes,
    resident_bytes,
    silent,
)
from dsquant.writers.base import write_index
from dsquant.writers.gguf.files import GgufFiles
from dsquant.writers.gguf.store import quantizer_name
from dsquant.writers.write_behind import WriteBehind


def awq(
    recipe: Recipe, resume: bool = False, restart: bool = False, report: Report = silent, ranks: Ranks = ALONE
) -> Result:
    """Quantizes a model as the recipe says.

    Args:
        recipe: what to do.
        resume: go on with an interrupted job, or begin one.
        restart: begin anew where there is an interrupted or finished one.
        report: gets the progress.
        ranks: who does it; all of them call this.

    Returns:
        Where the files are, and what quantization cost.

    Raises:
        UsageError: where the recipe cannot work (memory budget, a format that cannot store it).
        InputError: where model, texts or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    started = time.monotonic()
    recipe = ranks.together(lambda: _resolved_for(recipe, ranks))
    state = ranks.once(lambda: claim(recipe.output, recipe, resume, restart))
    if state == "finished":
        return result_of(recipe, json.loads((recipe.output / RECORD_FILE).read_text()), already_finished=True)
    with stop_on_signals() as request, full_disk_is_resumable():
        budget, gpu_budget = memory_budget(recipe), min(ranks.gather(gpu_memory_budget(recipe)))
        source = ranks.together(lambda: open_source(recipe, gpu_budget, ranks.size))
        limits = Limits(recipe.output, budget, source.plan.disk_bytes, gpu_budget)
        report(Progress("scan", 0, len(source.checkpoint.index), "", limits=limits))
        ranks.together(lambda: check_memory(source.plan.memory_bytes, budget, resident_bytes()))
        ranks.together(lambda: check_memory(source.plan.gpu_memory_bytes, gpu_budget, 0, "--gpu-memory-budget"))
        ranks.once(lambda: check_disk(recipe.output, source.plan.disk_bytes))
        within_budget = memory_guard(budget, resident_bytes)

        def check() -> None:
            request.safe_point()
            within_budget()

        index = source.checkpoint.index
        notes: dict[str, Any] = {}
        if state != "resume":
            notes = {
                "tensors": _scan(index, report, check, ranks),
                "shards": shard_times(index),
                "files": output_files(source),
            }
        with _shared_job(recipe, state, notes, ranks) as job:
            _check_unchanged(index, job.notes, report, check, ranks)
            run = Run(recipe, source, job, report, check, _open_files(recipe, source.plan, state, job), ranks=ranks)
            run.write_behind = WriteBehind() if recipe.device == "cuda" else None
            try:
                with gpu_within_budget(gpu_budget):
                    convert(run)
                record = ranks.alone(lambda beat: _finish_and_remove(run, check, beat))
            finally:
                if run.write_behind is not None:
                    run.write_behind.close()
                for files in run.gguf_files.values():
                    files.close()
    return result_of(
        recipe,
        record,
        elapsed_s=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
    )


def _resolved_for(recipe: Recipe, ranks: Ranks) -> Recipe:
    gguf = [name for name in recipe.to if name.startswith("gguf")]
    if gguf and ranks.size > 1:
        raise UsageError(
            f"--to {gguf[0]}: {ranks.size} processes cannot share the writing of GGUF; start one, or leave this out "
            "and run `dsquant gguf` afterwards"
        )
    return resolved(recipe)


@contextmanager
def _shared_job(recipe: Recipe, state: str, notes: dict[str, Any], ranks: Ranks) -> Iterator[Job]:
    """The job, whose lock rank 0 takes for all."""
    with ExitStack() as held:
        notes = ranks.once(lambda: held.enter_context(open_job(recipe.output, recipe, state, notes)).notes)
        work = recipe.output / WORK_FOLDER
        if ranks.size > 1:
            ranks.check_shared(work)
        yield Job(recipe.output, work, notes)


def _finish_and_remove(run: Run, check: Callable[[], None], beat: Callable[[], None]) -> dict[str, Any]:
    def check_and_beat() -> None:
        check()
        beat()

    run.check = check_and_beat
    record = finish(run)
    run.job.finish()
    return record


def _open_files(recipe: Recipe, plan: Plan, state: str, job: Job) -> dict[PurePosixPath, GgufFiles]:
    opened = {}
    for folder, target in plan.gguf.items():
        (recipe.output / folder).mkdir(exist_ok=True)
        resume = state == "resume" and bool(job.journal.units)
        opened[folder] = GgufFiles(recipe.output / folder, target.files, resume)
    return opened


def preview(recipe: Recipe, resume: bool = False, restart: bool = False) -> Preview:
    """Validates everything that headers tell and says what a run would do; writes nothing.

    Args:
        recipe: what to do.
        resume: as in `awq`.
        restart: as in `awq`.

    Returns:
        Sizes, memory and disk.

    Raises:
        UsageError: where the recipe cannot work.
        InputError: where model, texts or output folder cannot be used.
    """
    recipe = resolved(recipe)
    source = open_source(recipe)
    state = found_state(recipe.output, recipe, resume, restart)
    budget, resident = memory_budget(recipe), resident_bytes()
    check_memory(source.plan.memory_bytes, budget, resident)
    check_memory(source.plan.gpu_memory_bytes, gpu_memory_budget(recipe), 0, "--gpu-memory-budget")
    check_disk(recipe.output, source.plan.disk_bytes)
    plan = source.plan
    outputs = {target.format.name: target.shards.num_bytes for target in plan.targets}
    return Preview(
        model=str(source.checkpoint.folder),
        architecture=source.checkpoint.architecture,
        output=recipe.output,
        state=state,
        source_bytes=source.checkpoint.index.num_bytes,
        output_bytes=outputs | {target.name: target.num_bytes for target in plan.gguf.values()},
        details={"preset": str(recipe.preset), "quantized linears": len(frozenset().union(*plan.linears.values()))},
        calibration=source.calibration,
        notes=planned_warnings(recipe, source),
        memory_bytes=plan.memory_bytes + resident,
        memory_budget_bytes=budget,
        work_disk_bytes=plan.work_bytes,
    )


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
    recipe = recipe.model_copy(update={"device": resolved_device(recipe.device)})
    state = claim(recipe.output, recipe, resume, restart)
    if state == "finished":
        return result_of(recipe, json.loads((recipe.output / RECORD_FILE).read_text()), already_finished=True)
    with stop_on_signals() as request, full_disk_is_resumable():
        plan = plan_gguf(recipe)
        budget = memory_budget(recipe)
        limits = Limits(recipe.output, budget, plan.disk_bytes)
        report(Progress("scan", 0, len(plan.checkpoint.index), "", limits=limits))
        check_memory(plan.memory_bytes, budget, resident_bytes())
        check_disk(recipe.output, plan.disk_bytes)
        within_budget = memory_guard(budget, resident_bytes)

        def check() -> None:
            request.safe_point()
            within_budget()

        index = plan.checkpoint.index
        notes: dict[str, Any] = {}
        if state != "resume":
            notes = {
                "tensors": _scan(index, report, check),
                "shards": shard_times(index),
                "files": gguf_output_files(plan),
            }
            notes["quantizer"] = quantizer_name(recipe.device == "cuda")
        with open_job(recipe.output, recipe, state, notes) as job:
            _check_same_quantizer(recipe, job.notes["quantizer"])
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
            record = gguf_record(run, _evaluate_gguf(run) if recipe.evaluate else {})
            names, after_file = gguf_output_files(plan), _hashing(gguf_output_files(plan), run.safe_point)
            record = write_record(recipe.output, record, names, gguf_tensors(run), after_file)
            run.tell("hash", len(names), len(names), "")
            job.finish()
    return result_of(recipe, record, elapsed_s=time.monotonic() - started, peak_resident_bytes=peak_resident_bytes())


def _check_same_quantizer(recipe: GgufRecipe, before: str) -> None:
    """A resumed job must not mix the bytes of two quantizers."""
    now = quantizer_name(recipe.device == "cuda")
    if now != before:
        raise UsageError(
            f"{recipe.output} was begun with the quantizer {before}, here is {now}; install what it had, or begin anew "
            "with --restart"
        )


def preview_gguf(recipe: GgufRecipe, resume: bool = False, restart: bool = False) -> Preview:
    """Validates everything that headers tell and says what a conversion would write; writes nothing.

    Args:
        recipe: what to do.
        resume: as in `gguf`.
        restart: as in `gguf`.

    Returns:
        Files, sizes, types, memory and disk.

    Raises:
        UsageError: where the recipe cannot work.
        InputError: where model, texts, imatrix or output folder cannot be used.
    """
    recipe = recipe.model_copy(update={"device": resolved_device(recipe.device)})
    plan = plan_gguf(recipe)
    state = found_state(recipe.output, recipe, resume, restart)
    budget, resident = memory_budget(recipe), resident_bytes()
    check_memory(plan.memory_bytes, budget, resident)
    check_disk(recipe.output, plan.disk_bytes)
    sizes = {f"in {type_name}": format_size(size) for type_name, size in plan.target.bytes_by_type.items()}
    return Preview(
        model=str(plan.checkpoint.folder),
        architecture=plan.checkpoint.architecture,
        output=recipe.output,
        state=state,
        source_bytes=plan.checkpoint.index.num_bytes,
        output_bytes={file.file_name: file.num_bytes for file in plan.target.files},
        details={"type": recipe.type, "quantizer": quantizer_name(recipe.device == "cuda"), **sizes},
        calibration=plan.calibration,
        notes=list(plan.notes),
        memory_bytes=plan.memory_bytes + resident,
        memory_budget_bytes=budget,
        work_disk_bytes=plan.work_bytes,
    )


def _evaluate_gguf(run: GgufRun) -> dict[str, dict[str, Any]]:
    """Compares the files with the original on the shipped held-out texts."""
    plan = run.plan
    candidate = open_gguf(run.job.output / plan.target.files[0].file_name, plan.checkpoint)
    candidates = {plan.target.name: candidate}
    compared = Comparison(
        plan.skeleton, plan.checkpoint.weights, candidates, run.job.work, run.batch_samples, run.safe_point
    )
    return compare_on_texts(compared, plan.tokenizer, run.recipe.seq_len)


def _evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """Compares every output with the original on the shipped held-out texts."""
    source = run.source
    candidates = {
        target.format.name: open_checkpoint(run.job.output / target.folder).weights for target in source.plan.targets
    }
    for folder, target in source.plan.gguf.items():
        file = run.job.output / folder / target.files[0].file_name
        candidates[target.name] = open_gguf(file, source.checkpoint)
    original = open_checkpoint(source.checkpoint.folder).weights
    compared = Comparison(source.skeleton, original, candidates, run.job.work, run.batch_samples, run.safe_point)
    return compare_on_texts(compared, source.tokenizer, run.recipe.seq_len)


def _check_unchanged(
    index: ShardIndex, notes: dict[str, Any], report: Report, check: Callable[[], None], ranks: Ranks = ALONE
) -> None:
    """Refuses a source that is not what it was when the job began."""
    touched = ranks.once(lambda: bool(notes["shards"] != shard_times(index)))
    if touched and notes["tensors"] != _scan(index, report, check, ranks):
        raise InputError(
            f"{index.folder}: the source is not what it was when the job began; restore it, or begin anew with "
            "--restart"
        )


def _scan(index: ShardIndex, report: Report, check: Callable[[], None], ranks: Ranks = ALONE) -> dict[str, str]:
    own = list(index.values())[ranks.rank :: ranks.size]
    done = 0

    def after_tensor(name: str) -> None:
        nonlocal done
        check()
        done += 1
        report(Progress("scan", done, len(own), name, index.bytes_read))

    parts = ranks.gather(ranks.together(lambda: scan(index, after_tensor, own)))
    found = {name: digest for part in parts for name, digest in part.items()}
    return {name: found[name] for name in index}


def shard_times(index: ShardIndex) -> dict[str, list[int]]:
    """Size and time of change of every source file: where these are as before, a resumed job need not hash again."""
    found = {info.path.name: info.path.stat() for info in index.values()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}


def finish(run: Run, more: Mapping[str, Any] | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Writes what makes the shards a checkpoint, evaluates it, and writes the record last.

    Args:
        run: the run, with every unit made.
        more: further sections of the record.
        notes: further warnings.

    Returns:
        The record.
    """
    source, plan = run.source, run.source.plan
    for target in plan.targets:
        folder = run.job.output / target.folder
        card.copy_files(source.checkpoint.folder, folder)
        write_atomically(folder / card.CONFIG_FILE, _json(_config(run, target)))
        write_index(folder, target.shards)
    for gguf_folder, files in run.gguf_files.items():
        files.finish()
        write_observed_imatrix(run.job.work, run.job.output / gguf_folder, plan.units, source.calibration)
    record = run_record(run, _evaluate(run) if run.recipe.evaluate else {})
    record |= more or {}
    record["warnings"] = [*record["warnings"], *notes]
    for target in plan.targets:
        folder = run.job.output / target.folder
        write_atomically(folder / card.CARD_FILE, card.model_card(record, target.format.name).encode())
    names = output_files(source)
    record = write_record(run.job.output, record, names, run_tensors(run), _hashing(names, run.safe_point))
    run.tell("hash", len(names), len(names), "")
    return record


def _hashing(names: list[str], safe_point: Callable[[Stage, int, int, str], None]) -> Callable[[str], None]:
    """Tells of hashed files."""
    done = 0

    def after_file(name: str) -> None:
        nonlocal done
        done += 1
        safe_point("hash", done, len(names), name)

    return after_file


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
