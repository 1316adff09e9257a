"""Composes the stages into a job: validate, scan, calibrate, quantize layer by layer, finish.

Nothing is written before the whole input has been found good.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from dsquant.errors import UsageError
from dsquant.formats.protocol import OpenTarget, Surroundings
from dsquant.formats.write_behind import WriteBehind
from dsquant.jobs.folder import Job, held
from dsquant.jobs.folder_state import found_state
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.jobs.resources import check_disk
from dsquant.jobs.stopping import StopRequest, full_disk_is_resumable, stop_on_signals
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.options import format_size
from dsquant.pipeline.choice import choose_widths
from dsquant.pipeline.finish import finish
from dsquant.pipeline.inputs import gpu_memory_budget, gpu_within_budget, memory_budget, open_source, resolved
from dsquant.pipeline.memory import check_memory
from dsquant.pipeline.notices import planned_warnings
from dsquant.pipeline.planning import Plan
from dsquant.pipeline.predictions import keep_gradients
from dsquant.pipeline.preview import Preview
from dsquant.pipeline.record import output_files
from dsquant.pipeline.result import Result, finished_result, result_of
from dsquant.pipeline.run_state import Run
from dsquant.pipeline.source_read import hash_unread
from dsquant.pipeline.supervision import Supervised, input_hashes, source_hashes
from dsquant.pipeline.units import convert
from dsquant.precision.groups import MixedPlan
from dsquant.presets import preset_and_steps
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Limits, Report, peak_gpu_bytes, peak_resident_bytes, resident_bytes, silent
from dsquant.schemes import UNQUANTIZED
from dsquant.source.scan import SourceHashes


def run_job(
    recipe: Recipe, resume: bool = False, restart: bool = False, report: Report = silent, ranks: Ranks = ALONE
) -> Result:
    """Quantizes a model as the recipe says; all ranks call this.

    `resume` continues an interrupted job, or starts one; `restart` starts over where there is an interrupted or
    finished one. Raises UsageError where the recipe cannot work (memory budget, a format that cannot store it),
    InputError where model, texts or output folder cannot be used, Interrupted where the job stopped and can be resumed.
    """
    started = time.monotonic()
    recipe = ranks.together(lambda: resolved(recipe))
    told = {key: value for key, value in recipe.lasting().items() if key != "model"}  # which may lie elsewhere
    ranks.check_alike(told | {"resume": resume, "restart": restart}, UsageError, "start all with the same options")
    with _held(recipe, resume, restart, ranks) as (state, request):
        if state == "finished":
            return finished_result(recipe)
        budget, gpu_budget = memory_budget(recipe), min(ranks.gather(gpu_memory_budget(recipe)))
        source = ranks.together(lambda: open_source(recipe, gpu_budget, ranks.size))
        limits = Limits(recipe.output, budget, source.plan.disk_bytes, gpu_budget)
        supervised = Supervised(recipe, state, source.checkpoint.index, limits, request, report, ranks)
        supervised.check(source.plan.needs.memory_bytes, source.plan.needs.gpu_memory_bytes)
        facts = {name: value for target in source.plan.targets for name, value in target.facts.items()}
        ranks.check_alike(facts, UsageError, "install the same packages for every rank")
        files = [recipe.imatrix] if recipe.imatrix else []
        inputs = input_hashes(source.checkpoint.config, source.calibration, *files)
        with supervised.job(inputs, {"files": output_files(source), **facts}) as (job, check):
            _check_same_facts(recipe, job, facts)
            run = Run(recipe, source, job, report, check, ranks=ranks)
            run.read = SourceHashes(source.checkpoint.index, source_hashes(job))
            with gpu_within_budget(gpu_budget):
                choose_widths(run, output_files, gpu_budget)
                keep_gradients(run)
                with _opened(run, state):
                    convert(run)
                    hash_unread(run)
                    record = ranks.alone(lambda beat: _finish_and_remove(run, check, beat))
    return result_of(
        recipe,
        record,
        elapsed_s=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
    )


def _check_same_facts(recipe: Recipe, job: Job, facts: Mapping[str, Any]) -> None:
    """A resumed job must not mix the bytes of two quantizers."""
    for name, now in facts.items():
        if job.notes.get(name) != now:
            raise UsageError(
                f"{recipe.output} was begun with the {name} {job.notes.get(name)}, here is {now}; install what it had, "
                "or start over with --restart"
            )


@contextmanager
def _opened(run: Run, state: str) -> Iterator[None]:
    """Opens the outputs for as long as units are made and finished."""
    behind = WriteBehind() if run.recipe.device == "cuda" else None
    hashes = run.hashes if run.ranks.first else None
    surroundings = Surroundings(run.source.checkpoint, run.job.output, run.job.work, run.ranks, behind, hashes)
    resumed = state == "resume" and bool(run.job.journal.units)
    opened: list[OpenTarget] = []
    try:
        for target in run.source.plan.targets:
            opened.append(target.open(surroundings, resumed))
        run.opened = opened
        yield
    finally:
        if behind is not None:
            behind.close()
        run.hashes.close()
        for output in opened:
            output.close()


@contextmanager
def _held(recipe: Recipe, resume: bool, restart: bool, ranks: Ranks = ALONE) -> Iterator[tuple[str, StopRequest]]:
    """Holds the output, rank 0 for all; yields what was found in it, and what signals ask for."""
    threads = one_thread_an_operation(recipe.device)
    with stop_on_signals() as request, full_disk_is_resumable(), threads, ExitStack() as stack:
        yield ranks.once(lambda: stack.enter_context(held(recipe.output, recipe, resume, restart))), request


def _finish_and_remove(run: Run, check: Callable[[], None], beat: Callable[[], None]) -> dict[str, Any]:
    def check_and_beat() -> None:
        check()
        beat()

    run.check = check_and_beat
    record = finish(run)
    run.job.finish()
    return record


def preview(recipe: Recipe, resume: bool = False, restart: bool = False) -> Preview:
    """Validates everything that headers tell and returns the sizes, memory and disk of a run; writes nothing. Raises
    UsageError where the recipe cannot work, InputError where model, texts or output folder cannot be used."""
    recipe = resolved(recipe)
    source = open_source(recipe)
    state = found_state(recipe.output, recipe, resume, restart)
    budget, resident = memory_budget(recipe), resident_bytes()
    check_memory(source.plan.needs.memory_bytes, budget, resident)
    check_memory(source.plan.needs.gpu_memory_bytes, gpu_memory_budget(recipe), 0, "--gpu-memory-budget")
    check_disk(recipe.output, source.plan.disk_bytes)
    plan = source.plan
    outputs = {name: size for target in plan.targets for name, size in target.bytes_by_file.items()}
    if plan.mixed:
        outputs = {target.name: plan.mixed[str(target.folder)].total_bytes for target in plan.targets}
    return Preview(
        model=str(source.checkpoint.folder),
        architecture=source.checkpoint.architecture,
        output=recipe.output,
        state=state,
        source_bytes=source.checkpoint.index.num_bytes,
        output_bytes=outputs,
        details=_details(recipe, plan),
        calibration=source.calibration,
        notes=planned_warnings(recipe, source),
        memory_bytes=plan.needs.memory_bytes + resident,
        memory_budget_bytes=budget,
        work_disk_bytes=plan.needs.work_bytes,
    )


def _details(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    details: dict[str, Any] = {
        "preset": preset_and_steps(recipe.preset or "quality", recipe.steps),
        "quantized linears": len(frozenset().union(*plan.linears.values())),
    }
    for target in plan.targets:
        details |= target.facts
    for target in plan.targets:
        if plan.mixed:
            key = "target" if len(plan.targets) == 1 else f"target of {target.name}"
            details[key] = _target_words(recipe, plan.mixed[str(target.folder)])
        else:
            details |= target.details
    return details


def _target_words(recipe: Recipe, mixed: MixedPlan) -> str:
    target = f"{recipe.target_bits} bits" if recipe.target_bits is not None else format_size(mixed.total_bytes)
    widths = ", ".join("BF16" if width == UNQUANTIZED else str(width) for width in mixed.widths)
    return (
        f"at most {target}: {len(mixed.groups)} groups of linears are stored as one of {widths}, chosen once their "
        "sensitivity is measured"
    )
