"""Makes the units of an output, one after the other: each is written, brought to disk and journaled before the next is.

Where hidden states stay on a GPU, one process goes on with the next unit while those of the one before are written and
brought to disk; several processes wait for one another there.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.disk import sync_file, sync_folder
from dsquant.jobs.journal import START_OVER
from dsquant.kernels.graphs import launches_within
from dsquant.model.activations import Activations
from dsquant.model.passed_on import PassedOn
from dsquant.model.streaming import Stream, embed, mtp_inputs
from dsquant.model.structure import DecoderLayer
from dsquant.pipeline.kept import kept_file, scales_file
from dsquant.pipeline.planning import Unit
from dsquant.pipeline.predictions import gradients_of
from dsquant.pipeline.resume import check_kept, check_target, check_units, kept_files
from dsquant.pipeline.run_state import Run
from dsquant.pipeline.source_read import hash_unit
from dsquant.pipeline.writers import Writers, unit_writers
from dsquant.quantization.importance import observe_layer
from dsquant.quantization.layer import quantize_layer
from dsquant.quantization.layer_job import LayerJob, QuantizedStream
from dsquant.quantization.sequential import quantize_sequentially

Maker = Callable[[Run, Unit, Writers, Callable[[str], None]], dict[str, Any]]
"""Makes a unit: writes what it changes, and returns what the journal notes of it."""


def convert(run: Run, make: "Maker | None" = None) -> None:
    """Makes every unit that the journal does not have yet; without `make`, runs the original on the calibration tokens
    and quantizes the layers they reach.

    Raises InputError where files of finished units are damaged, Interrupted at a safe point; finished units are kept.
    """
    units = [unit for unit in run.source.plan.units if unit.action != "drop"]
    done = run.ranks.once(lambda: run.job.journal.units)
    if done:
        run.ranks.alone(lambda beat: _check_left(run, units, beat))
    run.ranks.once(lambda: _remove_leftovers(run, units))
    needs = run.source.plan.needs
    launches = launches_within(needs.launch_bytes, needs.keeps_launches)
    # the thread also ends a unit's closing where the job is stopped
    with launches, ThreadPoolExecutor(1, "dsquant-close") as beside:
        closing = list[Future[None]]()
        for number, unit in enumerate(units):
            if unit.name not in done:

                def safe_point(what: str, number: int = number) -> None:
                    run.safe_point("quantize", number, len(units), what)

                then = units[number + 1] if number + 1 < len(units) and make is None else None
                done[unit.name] = _make_unit(run, (unit, then), make or _calibrated, safe_point, (beside, closing))
                if "layer" in done[unit.name] and run.source.tokens_NT is not None:
                    run.tokens_done += run.source.tokens_NT.numel()  # of this run: the rate is that of its own time
            if "layer" in done[unit.name] and run.source.tokens_NT is not None:
                run.tell("quantize", number + 1, len(units), unit.name, done[unit.name]["layer"])
        _wait_for(closing)
    run.safe_point("quantize", len(units), len(units), "")


def _needed(run: Run, units: list[Unit]) -> list[Path]:
    """The hidden states that the first layer without a line in the journal reads; empty where there are none yet."""
    if run.source.tokens_NT is None:
        return []
    left = [unit for unit in units if unit.name not in run.job.journal.units]
    layers = [unit.layer.index for unit in left if unit.action == "quantize" and unit.layer is not None]
    return run.kept_paths(layers[0]) if layers and left[0].name != "embedding" else []


def _check_left(run: Run, units: list[Unit], beat: Callable[[], None]) -> None:
    """Checks all that the finished units of a resumed job have left."""

    def safe_point() -> None:
        run.check()
        beat()

    job, plan = run.job, run.source.plan
    check_units(job, [unit.name for unit in units])
    check_kept(job, [path.name for path in _needed(run, units)], safe_point)
    for target in plan.targets:
        check_target(job, target, safe_point)


def _remove_leftovers(run: Run, units: list[Unit]) -> None:
    """Removes the files of an interrupted unit: a rank that was lost then may still have them open."""
    needed = _needed(run, units)
    for path in run.job.work.glob("*.f32"):
        if path not in needed:
            path.unlink()


Beside = tuple[ThreadPoolExecutor, list[Future[None]]]
"""A thread, and the units that it is closing: at most one, which is waited for before the next is finished."""


def _make_unit(
    run: Run, units: tuple[Unit, Unit | None], make: Maker, safe_point: Callable[[str], None], beside: Beside
) -> dict[str, Any]:
    """Makes the first of two units, and begins to read what the second needs before all else."""
    (unit, then), (pool, closing) = units, beside
    resident = unit.layer is not None and unit.layer.index in run.source.plan.needs.gpu_resident
    if not resident:  # a layer with hidden states in files makes these first, and the disk has no room for a third's
        _wait_for(closing)
    with unit_writers(run, unit) as writers:
        notes = make(run, unit, writers, safe_point)
        _wait_for(closing)
        saved, passed_on = pool.submit(writers.save_hidden, run), pool.submit(writers.save_passed_on)
        _begin_reading(run, then)
        try:
            notes["tensors"] = writers.finish(run, unit, safe_point)
            notes["weight_errors"] = writers.weight_errors
            if run.read is not None:
                notes["source"] = hash_unit(run, unit, safe_point)
        finally:
            wait([saved])
    run.ranks.together(lambda: _wait_for([saved]))
    if run.ranks.size == 1:
        closing.append(pool.submit(_close, run, unit, notes, passed_on))
    else:
        run.ranks.together(lambda: _sync_hidden(run, unit))
        run.ranks.once(lambda: _close(run, unit, notes, passed_on))
    return notes


def _begin_reading(run: Run, unit: Unit | None) -> None:
    """Begins to read the attention of a layer that calibration reaches next."""
    if unit is not None and unit.action == "quantize" and unit.layer is not None and run.source.tokens_NT is not None:
        names = [f"{linear}.weight" for linear in unit.layer.attention_linears]
        run.source.checkpoint.weights.prefetch(names)


def _wait_for(futures: list[Future[None]]) -> None:
    """Waits for what another thread does; raises its error."""
    while futures:
        futures.pop().result()


def _sync_hidden(run: Run, unit: Unit) -> None:
    """Brings what the unit leaves for the next layer to disk."""
    for path in _left_for_next(run, unit):
        if path.is_file():
            sync_file(path)


def _calibrated(run: Run, unit: Unit, writers: Writers, safe_point: Callable[[str], None]) -> dict[str, Any]:
    if run.source.tokens_NT is None:
        return {}  # every parameter is stored as it is
    if unit.name == "embedding":
        run.ranks.once(lambda: _embed(run))
    elif unit.action == "quantize":
        return {"layer": _run_layer(run, unit, writers, safe_point)}
    return {}


def _left_for_next(run: Run, unit: Unit) -> list[Path]:
    """The files of hidden states that a unit makes."""
    return run.kept_paths(unit.layer.index + 1 if unit.layer is not None else 0)


def _close(run: Run, unit: Unit, notes: dict[str, Any], passed_on: Future[None]) -> None:
    """Brings hidden states to disk once they are written, notes the unit as finished, and removes those of the layer
    before."""
    passed_on.result()
    _sync_hidden(run, unit)
    own = [scales_file(unit.name), kept_file(unit.name)]
    notes["kept"] = kept_files(run.job.work, [*own, *(path.name for path in _left_for_next(run, unit))])
    sync_folder(run.job.work)
    run.job.journal.append(unit.name, **notes)
    if unit.action == "quantize" and unit.layer is not None:
        for path in run.kept_paths(unit.layer.index):
            path.unlink(missing_ok=True)
        for path in run.kept_paths(unit.layer.index + 1):
            if run.sums_path(path) != path:
                run.sums_path(path).unlink(missing_ok=True)


def _embed(run: Run) -> None:
    assert run.source.tokens_NT is not None
    for path in run.kept_paths(0):
        outputs = run.activations(path)
        embed(run.source.skeleton, run.source.checkpoint.weights, run.source.tokens_NT, outputs)
        outputs.flush()


def _inputs(run: Run, layer: DecoderLayer, path: Path, prepared: Path) -> Activations:
    """Opens the inputs of a layer, from the file `path`; those of a multi-token-prediction layer, in `prepared`, are
    made of them."""
    if not (path in run.passed_on or path.is_file()):  # a new one would hold zeros
        raise InputError(f"{path}: the hidden states of an earlier layer are gone; {START_OVER}")
    inputs = run.inputs(path)
    if layer.index < run.source.skeleton.num_layers:
        return inputs

    def prepare() -> None:
        assert run.source.tokens_NT is not None
        stream = Stream(run.source.checkpoint.weights, inputs, run.activations(prepared))
        mtp_inputs(run.source.skeleton, run.source.checkpoint.weights, layer, run.source.tokens_NT, stream)

    run.ranks.once(prepare)
    return run.activations(prepared)


def _quantized_stream(run: Run, layer: DecoderLayer, number: int) -> QuantizedStream:
    """The hidden states before and after a layer of the model that is quantized onto a grid."""
    inputs = _inputs(run, layer, run.quantized_path(layer.index, number), run.quantized_file("mtp", number))
    return QuantizedStream(
        inputs,
        run.outputs(layer.index, run.quantized_path(layer.index + 1, number)),
        run.mlp_inputs(layer.index, run.quantized_file("mlp-inputs", number), inputs),
    )


def _run_layer(run: Run, unit: Unit, writers: Writers, safe_point: Callable[[str], None]) -> dict[str, Any]:
    """Runs an original layer, and quantizes it where any linear is; else its weights are stored by their importance."""
    source, layer = run.source, unit.layer
    assert layer is not None
    inputs = _inputs(run, layer, run.hidden_path(layer.index), run.job.work / "mtp.f32")
    outputs = run.outputs(layer.index, run.hidden_path(layer.index + 1))
    job = LayerJob(
        source.skeleton,
        layer,
        source.checkpoint.weights,
        inputs,
        outputs,
        run.mlp_inputs(layer.index, run.job.work / "mlp-inputs.f32", inputs),
        linears=source.plan.linears_of(layer),
        schemes=source.plan.schemes,
        in_blocks=source.plan.in_blocks,
        packed=source.plan.packed,
        steps=run.recipe.steps,
        batch_samples=run.batch_samples,
        seed=run.recipe.seed,
        emit=writers.emit,
        safe_point=safe_point,
        note=writers.note,
        keep_scales=writers.keep_scales,
        quantized={grid: _quantized_stream(run, layer, number) for number, grid in enumerate(run.followed)},
        gradients=gradients_of(run, layer),
        ranks=run.ranks,
    )
    make = quantize_layer if source.plan.quantizes else observe_layer
    report = asdict(quantize_sequentially(job) if job.quantized else make(job))
    _keep_outputs(run, job, writers)
    return {"layer": layer.index, **report}


def _keep_outputs(run: Run, job: LayerJob, writers: Writers) -> None:
    """Leaves a layer's outputs to the next one: in memory, or for `writers` to save."""
    run.passed_on = {}
    streams = [(job.outputs, job.mlp_inputs)]
    streams += [(stream.outputs, stream.mlp_inputs) for stream in job.quantized.values()]
    for path, (outputs, place) in zip(run.kept_paths(job.layer.index + 1), streams, strict=True):
        if run.passes_on(job.layer.index):
            run.passed_on[path] = PassedOn(outputs, place)
            writers.passed_on.append((run.passed_on[path], path))
        else:
            writers.hidden.append((outputs, path))
