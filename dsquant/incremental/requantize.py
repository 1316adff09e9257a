"""Builds the output of a new release under an earlier output's scales, unit by unit; the job can be resumed.

The rule of docs/decisions: parameters whose source is unchanged stay as recorded, changed ones are folded with the
recorded scales and rounded by `rule`. A delta reuses the files in which nothing changed; a full run computes every byte
from the source and the recording. Both give the same output.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.disk import sync_folder
from dsquant.formats.output_shards import Shard, ShardFile
from dsquant.formats.protocol import Surroundings, UnitWriter
from dsquant.formats.safetensors_writer import OpenCheckpoint
from dsquant.formats.scales import recorded_fold
from dsquant.formats.unquantized import changed_tensors, unchanged_rows
from dsquant.incremental.recording import RecordedTarget, Recording, grid_places, recorded_targets
from dsquant.incremental.reuse import reuse_file
from dsquant.incremental.rule import rounded_as_recorded
from dsquant.incremental.sources import HeldTensors, held_once
from dsquant.jobs.folder import held, open_job
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.jobs.resources import check_disk
from dsquant.jobs.stopping import full_disk_is_resumable, stop_on_signals
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.model.overlays import Fold
from dsquant.model.repeated import check_repeated
from dsquant.pipeline.finish import finish
from dsquant.pipeline.inputs import Source, memory_budget, open_model
from dsquant.pipeline.planning import Unit, plan_run
from dsquant.pipeline.record import output_files
from dsquant.pipeline.run_state import Run
from dsquant.pipeline.supervision import check_inputs, input_hashes, shard_times, source_hashes
from dsquant.pipeline.units import convert
from dsquant.pipeline.writers import Writers
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Limits, Progress, Report
from dsquant.running import Again
from dsquant.schemes import QuantizedWeight
from dsquant.source.checkpoint import stored_parts
from dsquant.verification.strict_record import read_record


@dataclass
class Requantization:
    """Results of a job under recorded scales."""

    record: dict[str, Any]
    read_bytes: int = 0
    """Tensor data read of the new release."""
    reused: Counter[str] = field(default_factory=Counter)
    """How files were reused (reflink, hard link, copy) -> number of files."""
    reused_bytes: int = 0
    already_finished: bool = False


@dataclass
class _Work:
    """The state that all units share."""

    run: Run
    held: HeldTensors
    targets: Sequence[RecordedTarget]
    grids: Sequence[int]
    """Of the plan: their places in the record's layers."""
    reuse: bool
    done: Requantization


def requantize(recipe: Recipe, recording: Recording, reuse: bool, again: Again, report: Report) -> Requantization:
    """Builds the output of a recipe from `Recording.recipe`; returns the record, and what was read and reused.

    `reuse` reuses files in which nothing changed, and copies unchanged tensors. Raises InputError where the new release
    cannot be read or has other tensors, or the earlier output is damaged, UsageError where the recipe differs from an
    interrupted job's, Interrupted where the job stopped and can be resumed.
    """
    with (
        stop_on_signals() as request,
        full_disk_is_resumable(),
        one_thread_an_operation("cpu"),
        held(recipe.output, recipe, again.resume, again.restart) as state,
    ):
        if state == "finished":
            return Requantization(read_record(recipe.output / RECORD_FILE), already_finished=True)
        opened, skeleton = open_model(recipe.model, mtp=recipe.mtp)
        checkpoint, index = held_once(opened, recording.source_hashes)
        plan = plan_run(recipe, checkpoint, skeleton)
        targets = recorded_targets(recording, plan)
        disk_bytes = sum(target.num_bytes for target in plan.targets)
        report(Progress("scan", 0, len(index), "", limits=Limits(recipe.output, memory_budget(recipe), disk_bytes)))
        check_disk(recipe.output, disk_bytes)
        repeated = tuple(check_repeated(checkpoint, skeleton))
        source = Source(checkpoint, skeleton, None, None, recording.record["calibration"], plan, repeated)
        inputs = input_hashes(checkpoint.config, None)
        notes = {"shards": shard_times(index), "inputs": inputs, "files": output_files(source)}
        with open_job(recipe.output, recipe, state, notes) as job:
            check_inputs(job, inputs)
            if job.notes["shards"] != shard_times(index):
                raise InputError(f"{index.folder} has changed since the job began; start over with --restart")
            run = Run(recipe, source, job, report, request.safe_point)
            places = grid_places(recording, plan, checkpoint, skeleton)
            work = _Work(run, index, targets, places, reuse, Requantization({}))
            surroundings = Surroundings(checkpoint, job.output, job.work)
            run.opened = [_RecordedOutput(work, target, surroundings) for target in targets]
            convert(run, partial(_make_unit, work))
            _hash_rest(work)
            work.done.record = finish(run, *_summary(work))
            job.finish()
    work.done.read_bytes = index.bytes_read
    return work.done


def _make_unit(
    work: _Work, run: Run, unit: Unit, writers: Writers, safe_point: Callable[[str], None]
) -> dict[str, Any]:
    """Hashes a unit's source, and builds the parameters that changed."""
    recording = work.targets[0].recording
    pairs = [(target, writer) for (target, _), writer in zip(writers.by_target, _own(writers), strict=True)]
    source: dict[str, str] = {}
    changed = []
    for parameter in unit.parameters:
        safe_point(parameter)
        hashes = work.held.hold(stored_parts(work.held, parameter))
        source |= hashes
        is_changed = any(recording.source_hashes.get(name) != found for name, found in hashes.items())
        changed += [parameter] if is_changed else []
        for _, writer in pairs:
            writer.take(parameter, is_changed)
    writers.scales |= {str(target.folder): writer.scales() for target, writer in pairs}
    notes: dict[str, Any] = {"source": source, "changed": changed}
    notes["anew"] = [f"{target.name}: {name}" for target, writer in pairs for name in writer.anew]
    if unit.action == "quantize" and unit.layer is not None:
        layer = next(entry for entry in recording.record["layers"] if entry["layer"] == unit.layer.index)
        errors = {target.grid: writer.errors for target, writer in pairs}
        grids = zip(work.grids, run.source.plan.linears, strict=True)
        recorded = [{**layer["grids"][place], "weight_errors": errors[grid]} for place, grid in grids]
        notes["layer"] = {**layer, "grids": recorded}
    hashed = sum(len(entry["source"]) for entry in run.job.journal.units.values())
    run.tell("scan", hashed + len(source), len(work.held), unit.name)
    return notes


def _own(writers: Writers) -> "Iterator[_RecordedWriter]":
    for _, writer in writers.by_target:
        assert isinstance(writer, _RecordedWriter)
        yield writer


def _hash_rest(work: _Work) -> None:
    """Hashes the tensors that are in no unit: dropped layers, and those that engines compute."""
    run = work.run
    hashes = source_hashes(run.job)
    for name in work.held:
        if name not in hashes:
            run.safe_point("scan", len(hashes), len(work.held), name)
            hashes |= work.held.hold([name])
    run.job.notes["tensors"] = {name: hashes[name] for name in work.held}


class _RecordedOutput(OpenCheckpoint):
    """A checkpoint that is written from a recording."""

    def __init__(self, work: _Work, recorded: RecordedTarget, surroundings: Surroundings) -> None:
        super().__init__(recorded.target, surroundings)
        self._work, self._recorded = work, recorded

    def unit(self, name: str, parameters: tuple[str, ...]) -> "_RecordedWriter":  # type: ignore[override]
        """Starts a unit's shards."""
        unit = next(unit for unit in self._work.run.source.plan.units if unit.name == name)
        return _RecordedWriter(self._work, self._recorded, unit)


class _RecordedWriter(UnitWriter):
    """Writes one unit of one format."""

    def __init__(self, work: _Work, target: RecordedTarget, unit: Unit) -> None:
        super().__init__()
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
        """Builds a parameter, or leaves it to `commit`."""
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
        self.write(linear, weight)

    def _copy(self, parameter: str) -> None:
        checkpoint, target = self._work.run.source.checkpoint, self.target.target
        if parameter in self._fold:
            values = self._fold.apply(parameter, checkpoint.weights[parameter])
            for name, tensor in changed_tensors(target, checkpoint, parameter, values).items():
                self._write(name, 0, tensor)
            return
        for name, start, rows in unchanged_rows(target, checkpoint, parameter):
            self._write(name, start, rows)

    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        """Writes a linear's quantized weight, or a parameter's values."""
        tensors = {name: value} if isinstance(value, torch.Tensor) else self.target.target.format.pack(name, value)
        for stored_name, tensor in tensors.items():
            self._write(stored_name, 0, tensor)

    def _write(self, name: str, start: int, rows: torch.Tensor) -> None:
        stored, place = self.target.target.place_of.get(name, (name, None))
        shard = self._shard_of[stored]
        if shard.file_name not in self._open:
            self._open[shard.file_name] = ShardFile(self._folder, shard)
        self._open[shard.file_name].write_rows(stored, start, rows, place)
        self._written.add(name)
        self.bytes_written += rows.nbytes

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Leaves unchanged tensors to `commit`, which handles whole files."""

    def commit(self) -> dict[str, str]:
        """Copies unchanged tensors, reuses whole files, and flushes everything to disk; returns tensor -> SHA-256."""
        hashes: dict[str, str] = {}
        for shard in self._shards:
            hashes |= self._finish_shard(shard)
        sync_folder(self._folder)
        return hashes

    def _finish_shard(self, shard: Shard) -> dict[str, str]:
        file = self._open.get(shard.file_name)
        stacks = self.target.target.stacks
        parts = [part for tensor in shard.tensors for part in stacks.get(tensor.name, (tensor.name,))]
        missing = [name for name in parts if name not in self._written]
        old = self.target.intact(shard.file_name) if missing else None
        if file is None and old is not None:
            self._work.done.reused[reuse_file(old, self._folder / shard.file_name)] += 1
            self._work.done.reused_bytes += shard.num_bytes
            return self.target.hashes(shard.file_name)
        assert file is not None
        for name in missing:
            stored, place = self.target.target.place_of.get(name, (name, None))
            file.write_rows(stored, 0, self.target.read(name), place)
        return file.commit()

    def scales(self) -> dict[str, torch.Tensor]:
        """Returns the recorded scales of the unit's layer."""
        prefix = f"{self._layer.prefix}." if self._layer else " "
        return {name: self.target.scales.read(name) for name in self.target.scales if name.startswith(prefix)}

    def discard(self) -> None:
        """Removes unfinished files."""
        for file in self._open.values():
            file.discard()


def _summary(work: _Work) -> tuple[dict[str, Any], list[str]]:
    """Returns the record's section on the changes, and a warning for the user."""
    journal = work.run.job.journal.units.values()
    changed = [name for entry in journal for name in entry["changed"]]
    anew = [name for entry in journal for name in entry["anew"]]
    total = sum(len(unit.parameters) for unit in work.run.source.plan.units if unit.action != "drop")
    words = (
        f"made under the scales of an earlier release: {len(changed)} of {total} parameters have changed since and "
        f"were rounded without calibration, {len(anew)} linears on a new grid; layers' errors are the earlier ones"
    )
    return {"changes": {"parameters": total, "changed": changed, "anew": anew}}, [words]
