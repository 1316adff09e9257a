"""Composes the stages into a job: validate, scan, calibrate, quantize layer by layer, finish.

Nothing is written before the whole input has been found good.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any

from dsquant.errors import UsageError
from dsquant.formats.gguf.files import GgufFiles
from dsquant.formats.gguf.ranges import range_look
from dsquant.formats.gguf.store import quantizer_name
from dsquant.formats.write_behind import WriteBehind
from dsquant.jobs.folder import Job, StopRequest, found_state, full_disk_is_resumable, held, stop_on_signals
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.jobs.resources import check_disk, resolved_device
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.pipeline.finish import finish, finish_gguf
from dsquant.pipeline.gguf_units import GgufRun, convert_to_gguf, plan_gguf
from dsquant.pipeline.inputs import gpu_memory_budget, gpu_within_budget, memory_budget, open_source, resolved
from dsquant.pipeline.memory import check_memory
from dsquant.pipeline.plan import FOLLOW, WITHOUT_FOLLOW, Plan
from dsquant.pipeline.record import (
    Preview,
    Result,
    finished_result,
    gguf_output_files,
    output_files,
    planned_warnings,
    result_of,
)
from dsquant.pipeline.supervision import Supervised, input_hashes
from dsquant.pipeline.type_choice import choose_types
from dsquant.pipeline.units import Run, convert
from dsquant.pipeline.width_choice import choose_widths
from dsquant.precision.groups import MixedPlan
from dsquant.recipes import GgufRecipe, Recipe, TargetedRecipe, format_size, preset_and_steps
from dsquant.reporting.progress import Limits, Report, peak_gpu_bytes, peak_resident_bytes, resident_bytes, silent
from dsquant.schemes import UNQUANTIZED


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
    told = {key: value for key, value in recipe.lasting().items() if key != "model"}  # which may lie elsewhere
    ranks.check_alike(told | {"resume": resume, "restart": restart}, UsageError, "start all with the same options")
    with _held(recipe, resume, restart, ranks) as (state, request):
        if state == "finished":
            return finished_result(recipe)
        budget, gpu_budget = memory_budget(recipe), min(ranks.gather(gpu_memory_budget(recipe)))
        source = ranks.together(lambda: open_source(recipe, gpu_budget, ranks.size))
        limits = Limits(recipe.output, budget, source.plan.disk_bytes, gpu_budget)
        look = range_look(source.checkpoint, source.plan.gguf_tensors)
        supervised = Supervised(recipe, state, source.checkpoint.index, limits, request, report, ranks, look)
        supervised.check(source.plan.memory_bytes, source.plan.gpu_memory_bytes)
        inputs = input_hashes(source.checkpoint.config, source.calibration)
        with supervised.job(inputs, {"files": output_files(source)}) as (job, check):
            run = Run(recipe, source, job, report, check, _open_files(recipe, source.plan, state, job), ranks=ranks)
            run.write_behind = WriteBehind() if recipe.device == "cuda" else None
            try:
                with gpu_within_budget(gpu_budget):
                    choose_widths(run, output_files, gpu_budget)
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


@contextmanager
def _held(
    recipe: Recipe | GgufRecipe, resume: bool, restart: bool, ranks: Ranks = ALONE
) -> Iterator[tuple[str, StopRequest]]:
    """Holds the output, rank 0 for all; yields what was found in it, and what signals ask for."""
    threads = one_thread_an_operation(recipe.device)
    with stop_on_signals() as request, full_disk_is_resumable(), threads, ExitStack() as stack:
        yield ranks.once(lambda: stack.enter_context(held(recipe.output, recipe, resume, restart))), request


def _resolved_for(recipe: Recipe, ranks: Ranks) -> Recipe:
    gguf = [name for name in recipe.to if name.startswith("gguf")]
    if gguf and ranks.size > 1:
        raise UsageError(
            f"--to {gguf[0]}: {ranks.size} processes cannot share the writing of GGUF; start one, or leave this out "
            "and run `dsquant gguf` afterwards"
        )
    if "follow" in recipe.steps and ranks.size > 1:
        raise UsageError(
            f"{FOLLOW}: {ranks.size} processes cannot share a layer that is rounded linear by linear; start one, or "
            f"{WITHOUT_FOLLOW}"
        )
    if recipe.target is not None and ranks.size > 1:
        raise UsageError(
            f"--target-bits, --target-size: {ranks.size} processes cannot share the measuring of sensitivities yet; "
            "start one, or leave the target out"
        )
    return resolved(recipe)


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
    if plan.mixed is not None:
        outputs = dict.fromkeys(outputs, plan.mixed.total_bytes)
    return Preview(
        model=str(source.checkpoint.folder),
        architecture=source.checkpoint.architecture,
        output=recipe.output,
        state=state,
        source_bytes=source.checkpoint.index.num_bytes,
        output_bytes=outputs | {target.name: target.num_bytes for target in plan.gguf.values()},
        details=_details(recipe, plan),
        calibration=source.calibration,
        notes=planned_warnings(recipe, source),
        memory_bytes=plan.memory_bytes + resident,
        memory_budget_bytes=budget,
        work_disk_bytes=plan.work_bytes,
    )


def _details(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    details: dict[str, Any] = {
        "preset": preset_and_steps(recipe.preset or "quality", recipe.steps),
        "quantized linears": len(frozenset().union(*plan.linears.values())),
    }
    if plan.mixed is not None:
        details["target"] = _target_words(recipe, plan.mixed, "groups of linears")
    return details


def _target_words(recipe: TargetedRecipe, mixed: MixedPlan[Any], what: str) -> str:
    target = f"{recipe.target_bits} bits" if recipe.target_bits is not None else format_size(mixed.total_bytes)
    widths = ", ".join("BF16" if width == UNQUANTIZED else str(width) for width in mixed.widths)
    return (
        f"at most {target}: {len(mixed.groups)} {what} are stored as one of {widths}, chosen once their sensitivity is "
        "measured"
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
    with _held(recipe, resume, restart) as (state, request):
        if state == "finished":
            return finished_result(recipe)
        plan = plan_gguf(recipe)
        limits = Limits(recipe.output, memory_budget(recipe), plan.disk_bytes)
        look = range_look(plan.checkpoint, plan.target.tensors.values())
        supervised = Supervised(recipe, state, plan.checkpoint.index, limits, request, report, look=look)
        supervised.check(plan.memory_bytes)
        notes = {"files": gguf_output_files(plan), "quantizer": quantizer_name(recipe.device == "cuda")}
        files = [recipe.imatrix] if recipe.imatrix else []
        inputs = input_hashes(plan.checkpoint.config, plan.calibration, *files)
        with supervised.job(inputs, notes) as (job, check):
            _check_same_quantizer(recipe, job.notes["quantizer"])
            run = GgufRun(recipe, plan, job, report, check)
            choose_types(run, gguf_output_files)
            again = state == "resume" and bool(job.journal.units)
            run.files = GgufFiles(recipe.output, run.plan.target.files, again)
            try:
                convert_to_gguf(run)
                record = finish_gguf(run)
            finally:
                run.files.close()
            job.finish()
    return result_of(recipe, record, elapsed_s=time.monotonic() - started, peak_resident_bytes=peak_resident_bytes())


def _check_same_quantizer(recipe: GgufRecipe, before: str) -> None:
    """A resumed job must not mix the bytes of two quantizers."""
    now = quantizer_name(recipe.device == "cuda")
    if now != before:
        raise UsageError(
            f"{recipe.output} was begun with the quantizer {before}, here is {now}; install what it had, or start over "
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
    outputs = {file.file_name: file.num_bytes for file in plan.target.files}
    details = {f"in {type_name}": format_size(size) for type_name, size in plan.target.bytes_by_type.items()}
    if plan.mixed is not None:
        outputs = {plan.target.name: plan.mixed.total_bytes}
        details = {"target": _target_words(recipe, plan.mixed, "tensors")}
    return Preview(
        model=str(plan.checkpoint.folder),
        architecture=plan.checkpoint.architecture,
        output=recipe.output,
        state=state,
        source_bytes=plan.checkpoint.index.num_bytes,
        output_bytes=outputs,
        details={"type": recipe.type, "quantizer": quantizer_name(recipe.device == "cuda"), **details},
        calibration=plan.calibration,
        notes=list(plan.notes),
        memory_bytes=plan.memory_bytes + resident,
        memory_budget_bytes=budget,
        work_disk_bytes=plan.work_bytes,
    )
