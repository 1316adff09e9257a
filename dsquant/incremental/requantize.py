"""Makes the output of a new release under an earlier output's scales, unit by unit; the job can be resumed.

The rule of docs/decisions: parameters whose source is unchanged stay as recorded, changed ones are folded with the
recorded scales and rounded by `rule`. A delta reuses the files in which nothing changed; a full run makes every byte
from the source and the recording. Both give the same output.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.disk import sync_folder
from dsquant.formats.scales import keep_scales, recorded_fold
from dsquant.formats.shards import Shard, ShardFile
from dsquant.incremental.recording import RecordedTarget, Recording, recorded_targets
from dsquant.incremental.reuse import reuse_file
from dsquant.incremental.rule import rounded_as_recorded
from dsquant.incremental.sources import HeldTensors, held_once, stored_parts
from dsquant.jobs.folder import RECORD_FILE, full_disk_is_resumable, held, open_job, stop_on_signals
from dsquant.jobs.resources import check_disk
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.model.overlays import Fold
from dsquant.model.repeated import check_repeated
from dsquant.pipeline.finish import finish
from dsquant.pipeline.gguf_units import work_files
from dsquant.pipeline.inputs import Source, memory_budget, open_model
from dsquant.pipeline.plan import Unit, plan_run
from dsquant.pipeline.record import output_files
from dsquant.pipeline.resume import check_checkpoints, check_kept, check_units, kept_files
from dsquant.pipeline.supervision import check_inputs, input_hashes, shard_times
from dsquant.pipeline.units import ROWS_AT_ONCE, Run
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Limits, Progress, Report
from dsquant.source.shards import DTYPES
from dsquant.verification.record import read_record


@dataclass
class Requantization:
    """What a job under recorded scales did."""

    record: dict[str, Any]
    read_bytes: int = 0
    """Tensor data of the new release that were read."""
    reused: Counter[str] = field(default_factory=Counter)
    """How files were reused (reflink, hard link, copy) -> number of files."""
    reused_bytes: int = 0
    already_finished: bool = False


@dataclass
class _Work:
    """What every unit needs."""

    run: Run
    held: HeldTensors
    targets: list[RecordedTarget]
    reuse: bool
    done: Requantization


def requantize(
    recipe: Recipe, recording: Recording, reuse: bool, resume: bool, restart: bool, report: Report
) -> Requantization:
    """Makes the output.

    Args:
        recipe: from `Recording.recipe`.
        recording: the earlier output.
        reuse: whether files in which nothing changed are reused, and unchanged tensors copied.
        resume: go on with an interrupted job, or begin one.
        restart: begin anew where there is an interrupted or finished one.
        report: gets the progress.

    Returns:
        The record, and what was read and reused.

    Raises:
        InputError: where the new release cannot be read, has other tensors, or the earlier output is damaged.
        UsageError: where the recipe differs from an interrupted job's.
        Interrupted: where the job stopped and can be resumed.
    """
    with (
        stop_on_signals() as request,
        full_disk_is_resumable(),
        one_thread_an_operation("cpu"),
        held(recipe.output, recipe, resume, restart) as state,
    ):
        if state == "finished":
            return Requantization(read_record(recipe.output / RECORD_FILE), already_finished=True)
        opened, skeleton = open_model(recipe.model)
        checkpoint, index = held_once(opened, recording.source_hashes)
        plan = plan_run(recipe, checkpoint, skeleton)
        targets = recorded_targets(recording, plan)
        disk_bytes = sum(target.shards.num_bytes for target in plan.targets)
        report(Progress("scan", 0, len(index), "", limits=Limits(recipe.output, memory_budget(recipe), disk_bytes)))
        check_disk(recipe.output, disk_bytes)
        repeated = tuple(check_repeated(checkpoint, skeleton))
        source = Source(checkpoint, skeleton, None, torch.zeros(0, 0), recording.record["calibration"], plan, repeated)
        inputs = input_hashes(checkpoint.config, None)
        notes = {"tensors": {}, "shards": shard_times(index), "inputs": inputs, "files": output_files(source)}
        with open_job(recipe.output, recipe, state, notes) as job:
            check_inputs(job, inputs)
            if job.notes["shards"] != shard_times(index):
                raise InputError(f"{index.folder} has changed since the job began; start over with --restart")
            run = Run(recipe, source, job, report, request.safe_point)
            work = _Work(run, index, targets, reuse, Requantization({}))
            _make_units(work)
            work.done.record = finish(run, *_summary(work))
            job.finish()
    work.done.read_bytes = index.bytes_read
    return work.done


def _make_units(work: _Work) -> None:
    run = work.run
    units = [unit for unit in run.source.plan.units if unit.action != "drop"]
    num_hashed = 0
    if run.job.journal.units:
        check_units(run.job, [unit.name for unit in units])
        check_kept(run.job, [], run.check)
        plans = {target.folder: target.shards for target in run.source.plan.targets}
        check_checkpoints(run.job, plans, run.check)
    for number, unit in enumerate(units):
        run.safe_point("quantize", number, len(units), unit.name)
        if unit.name not in run.job.journal.units:
            _make_unit(work, unit)
        num_hashed += len(run.job.journal.units[unit.name]["source"])
        run.tell("scan", num_hashed, len(work.held), unit.name)
    run.tell("quantize", len(units), len(units), "")
    hashes = {name: found for entry in run.job.journal.units.values() for name, found in entry["source"].items()}
    for name in work.held:
        if name not in hashes:  # dropped layers, and what engines compute
            run.safe_point("scan", len(hashes), len(work.held), name)
            hashes |= work.held.hold([name])
    run.job.notes["tensors"] = {name: hashes[name] for name in work.held}


def _make_unit(work: _Work, unit: Unit) -> None:
    run, recorded = work.run, {layer["layer"]: layer for layer in work.targets[0].recording.record["layers"]}
    writers = [_UnitWriter(work, target, unit) for target in work.targets]
    source: dict[str, str] = {}
    changed = []
    try:
        for parameter in unit.parameters:
            run.check()
            hashes = work.held.hold(stored_parts(work.held, parameter))
            source |= hashes
            before = work.targets[0].recording.source_hashes
            is_changed = any(before.get(name) != found for name, found in hashes.items())
            changed += [parameter] if is_changed else []
            for writer in writers:
                writer.take(parameter, is_changed)
        tensors = {str(writer.target.target.folder): writer.finish() for writer in writers}
    finally:
        for writer in writers:
            writer.discard()
    scales = {str(writer.target.target.folder): writer.scales() for writer in writers}
    keep_scales(run.job.work, unit.name, scales)
    sync_folder(run.job.work)
    notes: dict[str, Any] = {"tensors": tensors, "source": source, "changed": changed}
    notes["kept"] = kept_files(run.job.work, work_files(unit.name))
    notes["anew"] = [f"{writer.target.target.format.name}: {name}" for writer in writers for name in writer.anew]
    if unit.action == "quantize" and unit.layer is not None:
        layer = recorded[unit.layer.index]
        errors = {writer.target.target.grid: writer.errors for writer in writers}
        grids = zip(layer["grids"], run.source.plan.linears, strict=True)
        notes["layer"] = {**layer, "grids": [{**found, "weight_errors": errors[grid]} for found, grid in grids]}
    run.job.journal.append(unit.name, **notes)


class _UnitWriter:
    """Writes one unit of one format."""

    def __init__(self, work: _Work, target: RecordedTarget, unit: Unit) -> None:
        self.target = target
        self.errors: dict[str, float] = {}
        self.anew: list[str] = []
        self._work = work
        self._layer = unit.layer
        weights = work.run.source.checkpoint.weights
        self._fold = Fold() if unit.layer is None else recorded_fold(unit.layer, weights, target.scales)
        self._folder = work.run.job.output / target.target.folder
        self._folder.mkdir(exist_ok=True)
        self._shards = target.target.shards.shards_of(unit.name)
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.tensors}
        self._open: dict[str, ShardFile] = {}
        self._written: set[str] = set()

    def take(self, parameter: str, changed: bool) -> None:
        """Makes a parameter, or leaves it to `finish`."""
        linear = parameter.removesuffix(".weight")
        quantized = linear in self.target.errors
        if quantized and not changed:
            self.errors[linear] = self.target.errors[linear]
        if self._work.reuse and not changed:
            return
        if quantized:
            self._quantize(linear, changed)
        else:
            self._copy(parameter)

    def _quantize(self, linear: str, changed: bool) -> None:
        weight = self.target.weight(linear)
        if changed:
            name = f"{linear}.weight"
            folded = self._fold.apply(name, self._work.run.source.checkpoint.weights[name])
            weight, anew = rounded_as_recorded(folded, weight, self.target.errors[linear])
            self.errors[linear] = float(weight.relative_error(folded))
            self.anew += [linear] if anew else []
        for name, tensor in self.target.target.format.pack(linear, weight).items():
            self._write(name, 0, tensor)

    def _copy(self, parameter: str) -> None:
        source = self._work.run.source
        weights, dtype = source.checkpoint.weights, DTYPES[source.plan.dtypes[parameter]]
        if parameter in self._fold:
            self._write(parameter, 0, self._fold.apply(parameter, weights[parameter]).to(dtype))
            return
        num_rows = weights.shape(parameter)[0]
        for start in range(0, num_rows, ROWS_AT_ONCE):
            rows = weights.rows(parameter, start, min(start + ROWS_AT_ONCE, num_rows))
            self._write(parameter, start, rows.to(dtype))

    def _write(self, name: str, start: int, rows: torch.Tensor) -> None:
        shard = self._shard_of[name]
        if shard.file_name not in self._open:
            self._open[shard.file_name] = ShardFile(self._folder, shard)
        self._open[shard.file_name].write_rows(name, start, rows)
        self._written.add(name)
        self._work.run.bytes_written += rows.nbytes

    def finish(self) -> dict[str, str]:
        """Copies what has not changed, reuses whole files, and brings all to disk; returns tensor -> SHA-256."""
        hashes: dict[str, str] = {}
        for shard in self._shards:
            hashes |= self._finish_shard(shard)
        sync_folder(self._folder)
        return hashes

    def _finish_shard(self, shard: Shard) -> dict[str, str]:
        file = self._open.get(shard.file_name)
        missing = [tensor.name for tensor in shard.tensors if tensor.name not in self._written]
        old = self.target.intact(shard.file_name) if missing else None
        if file is None and old is not None:
            self._work.done.reused[reuse_file(old, self._folder / shard.file_name)] += 1
            self._work.done.reused_bytes += shard.num_bytes
            return self.target.hashes(shard.file_name)
        assert file is not None
        for name in missing:
            file.write_rows(name, 0, self.target.index.read(name))
        return file.commit()

    def scales(self) -> dict[str, torch.Tensor]:
        """The recorded scales of the unit's layer."""
        prefix = f"{self._layer.prefix}." if self._layer else " "
        return {name: self.target.scales.read(name) for name in self.target.scales if name.startswith(prefix)}

    def discard(self) -> None:
        """Removes what is unfinished."""
        for file in self._open.values():
            file.discard()


def _summary(work: _Work) -> tuple[dict[str, Any], list[str]]:
    """What the record tells of the changes, and what a user should know."""
    journal = work.run.job.journal.units.values()
    changed = [name for entry in journal for name in entry["changed"]]
    anew = [name for entry in journal for name in entry["anew"]]
    total = sum(len(unit.parameters) for unit in work.run.source.plan.units if unit.action != "drop")
    words = (
        f"made under the scales of an earlier release: {len(changed)} of {total} parameters have changed since and "
        f"were rounded without calibration, {len(anew)} linears on a new grid; layers' errors are the earlier ones"
    )
    return {"changes": {"parameters": total, "changed": changed, "anew": anew}}, [words]
