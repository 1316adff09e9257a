"""Makes the units of an output, one after the other: each is written, brought to disk and journaled before the next."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dsquant.files.disk import sync_folder
from dsquant.formats.gguf.files import GgufFiles
from dsquant.formats.gguf.target import GgufUnitWriter
from dsquant.formats.scales import keep_scales
from dsquant.formats.shards import ShardFile
from dsquant.formats.write_behind import WriteBehind
from dsquant.jobs.folder import Job
from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations, stored_dtype
from dsquant.model.streaming import Stream, embed, mtp_inputs, samples_together
from dsquant.model.structure import DecoderLayer
from dsquant.pipeline.gguf_units import keep_observed, note_importance, work_files
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.plan import Target, Unit
from dsquant.pipeline.resume import check_checkpoints, check_gguf, check_kept, check_units, kept_files
from dsquant.quantization.layer import quantize_layer
from dsquant.quantization.layer_job import LayerJob, QuantizedStream
from dsquant.quantization.statistics import Importance
from dsquant.quantization.successive import quantize_successively
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Progress, Report, Stage
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.shards import DTYPES

# Tables are copied in parts of this many rows: a multiple of the FP8 block, 112 MiB for R1's embedding.
ROWS_AT_ONCE = 4096


@dataclass
class Run:
    """What a running job needs everywhere."""

    recipe: Recipe
    source: Source
    job: Job
    report: Report
    check: Callable[[], None]
    """Raises where the job has to stop here."""
    gguf_files: dict[PurePosixPath, GgufFiles] = field(default_factory=dict)
    """Folder inside the output folder -> its open GGUF files."""
    write_behind: WriteBehind | None = None
    """Writes what comes from a GPU."""
    ranks: Ranks = ALONE
    """Who does the job."""
    bytes_written: int = 0
    tokens_done: int = 0

    def safe_point(self, stage: Stage, done: int, total: int, what: str) -> None:
        """Tells where the job is, and stops it if it must."""
        self.check()
        self.tell(stage, done, total, what)

    def tell(self, stage: Stage, done: int, total: int, what: str, layer: dict[str, Any] | None = None) -> None:
        """Tells where the job is, and what came of a finished layer."""
        counts = (self.source.checkpoint.index.bytes_read, self.bytes_written, self.tokens_done)
        self.report(Progress(stage, done, total, what, *counts, layer=layer))

    @property
    def batch_samples(self) -> int:
        """Samples that pass attention together."""
        return samples_together(self.recipe.seq_len)

    def hidden_path(self, layer: int) -> Path:
        """The file of a layer's inputs, float32; bfloat16 where a GPU makes them."""
        return self.job.work / f"hidden-{layer}.f32"

    def quantized_path(self, layer: int) -> Path:
        """The file of what a layer gets in the quantized model."""
        return self.job.work / f"hidden-{layer}-quantized.f32"

    def kept_paths(self, layer: int) -> list[Path]:
        """The files that a layer reads."""
        own = [self.hidden_path(layer)]
        return [*own, self.quantized_path(layer)] if self.follows_quantized else own

    @property
    def follows_quantized(self) -> bool:
        """Whether linears are rounded for the inputs that the quantized model gives them."""
        return "follow" in self.recipe.steps

    @property
    def mtp_path(self) -> Path:
        """The file of a multi-token-prediction layer's inputs."""
        return self.job.work / "mtp.f32"

    @property
    def device(self) -> torch.device:
        """Where the job computes."""
        return self.source.checkpoint.weights.device

    def activations(self, path: Path) -> Activations:
        """The activations in a file of the work folder."""
        return Activations.in_file(path, self._hidden_shape, self.device)

    def mlp_inputs(self, layer: int, path: Path) -> Activations:
        """What a layer's MLPs read: on the GPU where the plan has room for it there, else in a file."""
        if layer not in self.source.plan.gpu_resident:
            return self.activations(path)
        return Activations(torch.zeros(self._hidden_shape, dtype=stored_dtype(self.device), device=self.device))

    def outputs(self, layer: int, path: Path) -> Activations:
        """What a layer's outputs are summed in, float32, until `keep` lays them into the file that is named."""
        if layer in self.source.plan.gpu_resident:
            (first, end), (_, *shape) = self.own_samples, self._hidden_shape
            return Activations(torch.zeros(end - first, *shape, device=self.device), first_sample=first)
        return Activations.in_file(self.sums_path(path), self._hidden_shape, self.device, torch.float32)

    def sums_path(self, path: Path) -> Path:
        """The file in which outputs are summed that another keeps: the same where that keeps float32."""
        return path if stored_dtype(self.device) == torch.float32 else path.with_suffix(".sums.f32")

    def keep(self, outputs: Activations, path: Path) -> None:
        """Brings this rank's samples of what a layer's outputs were summed in to disk."""
        if outputs.path == path:
            outputs.flush()
        else:
            outputs.save(path, self.own_samples)

    @property
    def own_samples(self) -> tuple[int, int]:
        """This rank's samples in a layer's dense part: the first, and the one behind the last."""
        shares = Shares(self._hidden_shape[0], self.batch_samples, self.ranks.size)
        return shares.samples(self.ranks.rank)

    @property
    def _hidden_shape(self) -> tuple[int, int, int]:
        samples, tokens = self.source.tokens_NT.shape
        return samples, tokens, int(self.source.skeleton.config["hidden_size"])


class UnitWriter:
    """Writes one unit's tensors into one target's shards."""

    def __init__(self, run: Run, target: Target, unit: Unit) -> None:
        self.target = target
        self._unit = unit
        self._run = run
        folder = run.job.output / target.folder
        folder.mkdir(exist_ok=True)
        self._shards = [ShardFile(folder, shard, run.ranks.first) for shard in target.shards.shards_of(unit.name)]
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.plan.tensors}
        self._written: set[str] = set()

    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        """Writes a linear's quantized weight, or a parameter's values in its planned dtype."""
        if isinstance(value, QuantizedWeight):
            for stored_name, tensor in self.target.format.pack(name, value).items():
                self._write_rows(stored_name, 0, tensor)
            self._written.add(f"{name}.weight")
            return
        self._write_rows(name, 0, value.to(DTYPES[self._run.source.plan.dtypes[name]]))
        self._written.add(name)

    def _write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        shard = self._shard_of[name]
        if self._run.write_behind is not None:  # all of a shard in one thread
            self._run.write_behind.write(rows, partial(shard.write_rows, name, start))
        else:
            shard.write_rows(name, start, rows)
        self._run.bytes_written += rows.nbytes

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Copies the unit's parameters that nothing has changed, in parts of bounded size."""
        weights, dtypes = self._run.source.checkpoint.weights, self._run.source.plan.dtypes
        written = set[str]().union(*self._run.ranks.gather(self._written))
        rest = [name for name in self._unit.parameters if name not in written]
        for name in rest[self._run.ranks.rank :: self._run.ranks.size]:
            safe_point(name)
            num_rows = weights.shape(name)[0]
            for start in range(0, num_rows, ROWS_AT_ONCE):
                rows = weights.rows(name, start, min(start + ROWS_AT_ONCE, num_rows))
                self._write_rows(name, start, rows.to(DTYPES[dtypes[name]]))

    def commit(self) -> dict[str, str]:
        """Brings every shard to disk under its final name; returns tensor name -> SHA-256."""
        if self._run.write_behind is not None:
            self._run.write_behind.wait()
        own = [shard.sync() for shard in self._shards]
        found = [hashes for part in self._run.ranks.gather(own) for hashes in part]
        hashes = {name: digest for hashes in found for name, digest in hashes.items()}
        for shard in self._shards:
            shard.publish(hashes)
        return {tensor.name: hashes[tensor.name] for shard in self._shards for tensor in shard.plan.tensors}

    def discard(self) -> None:
        """Removes what was written."""
        if self._run.write_behind is not None:
            self._run.write_behind.drop()
        for shard in self._shards:
            shard.discard()


@dataclass
class _Writers:
    """Everything that one unit is written into."""

    checkpoints: list[UnitWriter]
    gguf: dict[PurePosixPath, GgufUnitWriter]
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Folder -> producer -> the scales that were folded."""

    def emit(self, grid: Grid, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        for writer in self.checkpoints:
            if writer.target.grid == grid:
                writer.write(name, value)
        if not grid.rounded:
            assert isinstance(value, torch.Tensor)
            for gguf_writer in self.gguf.values():
                gguf_writer.write(name, value)

    def note(self, grid: Grid, linear: str, importance: Importance) -> None:
        for writer in self.gguf.values():
            note_importance(writer, linear, importance)

    def keep_scales(self, grid: Grid, producer: str, scales_I: torch.Tensor) -> None:
        folders = [writer.target.folder for writer in self.checkpoints if writer.target.grid == grid]
        for folder in folders if grid.rounded else self.gguf:
            self.scales.setdefault(str(folder), {})[producer] = scales_I.to("cpu", copy=True)

    def finish(self, run: Run, unit: Unit, safe_point: Callable[[str], None]) -> dict[str, dict[str, str]]:
        """Writes the rest and brings all to disk; returns folder -> tensor -> SHA-256."""
        for writer in self.checkpoints:
            writer.copy_rest(safe_point)
        hashes = {str(writer.target.folder): writer.commit() for writer in self.checkpoints}
        for folder, gguf_writer in self.gguf.items():
            gguf_writer.copy_rest(safe_point)
            hashes[str(folder)] = gguf_writer.commit()
            keep_observed(run.job.work, unit.name, gguf_writer.observed)
            run.bytes_written += gguf_writer.bytes_written
        scales: dict[str, dict[str, torch.Tensor]] = {}
        for part in run.ranks.gather(self.scales):
            for name, found in part.items():
                scales.setdefault(name, {}).update(found)
        run.ranks.once(lambda: keep_scales(run.job.work, unit.name, scales))
        return hashes


@contextmanager
def _unit_writers(run: Run, unit: Unit) -> Iterator[_Writers]:
    plan, checkpoint = run.source.plan, run.source.checkpoint
    gguf = {
        folder: GgufUnitWriter(checkpoint, target, run.gguf_files[folder], unit.parameters)
        for folder, target in plan.gguf.items()
    }
    writers = _Writers([], gguf)

    def begin() -> None:
        for target in plan.targets:
            writers.checkpoints.append(UnitWriter(run, target, unit))

    try:
        run.ranks.after_first(begin)
        yield writers
    finally:
        for writer in writers.checkpoints:
            writer.discard()


def convert(run: Run) -> None:
    """Makes every unit that the journal does not have yet.

    Args:
        run: the running job.

    Raises:
        InputError: where what finished units have left is damaged.
        Interrupted: at a safe point, where the job has to stop; finished units are kept.
    """
    units = [unit for unit in run.source.plan.units if unit.action != "drop"]
    done = run.ranks.once(lambda: run.job.journal.units)
    if done:
        run.ranks.alone(lambda beat: _check_left(run, units, beat))
    run.ranks.once(lambda: _remove_leftovers(run, units))
    for number, unit in enumerate(units):
        if unit.name not in done:

            def safe_point(what: str, number: int = number) -> None:
                run.safe_point("quantize", number, len(units), what)

            done[unit.name] = _make_unit(run, unit, safe_point)
        if unit.action == "quantize":
            run.tokens_done += run.source.tokens_NT.numel()
            run.tell("quantize", number + 1, len(units), unit.name, done[unit.name]["layer"])
    run.safe_point("quantize", len(units), len(units), "")


def _needed(run: Run, units: list[Unit]) -> list[Path]:
    """The hidden states that the first layer without a line in the journal reads; empty where there are none yet."""
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
    check_checkpoints(job, {target.folder: target.shards for target in plan.targets}, safe_point)
    for folder, gguf_target in plan.gguf.items():
        check_gguf(job, folder, gguf_target.files, safe_point)


def _remove_leftovers(run: Run, units: list[Unit]) -> None:
    """Removes the files of an interrupted unit: a rank that was lost then may still have them open."""
    needed = _needed(run, units)
    for path in run.job.work.glob("*.f32"):
        if path not in needed:
            path.unlink()


def _make_unit(run: Run, unit: Unit, safe_point: Callable[[str], None]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    with _unit_writers(run, unit) as writers:
        if unit.name == "embedding":
            run.ranks.once(lambda: _embed(run))
        elif unit.action == "quantize":
            notes["layer"] = _quantize_layer(run, unit, writers, safe_point)
        notes["tensors"] = writers.finish(run, unit, safe_point)
        notes["weight_errors"] = {str(folder): writer.weight_errors for folder, writer in writers.gguf.items()}
    run.ranks.once(lambda: _journal(run, unit, notes))
    return notes


def _journal(run: Run, unit: Unit, notes: dict[str, Any]) -> None:
    made = run.kept_paths(unit.layer.index + 1 if unit.layer is not None else 0)
    notes["kept"] = kept_files(run.job.work, [*work_files(unit.name), *(path.name for path in made)])
    sync_folder(run.job.work)
    run.job.journal.append(unit.name, **notes)
    if unit.action == "quantize" and unit.layer is not None:
        for path in run.kept_paths(unit.layer.index):
            path.unlink(missing_ok=True)
        for path in run.kept_paths(unit.layer.index + 1):
            if run.sums_path(path) != path:
                run.sums_path(path).unlink(missing_ok=True)


def _embed(run: Run) -> None:
    for path in run.kept_paths(0):
        outputs = run.activations(path)
        embed(run.source.skeleton, run.source.checkpoint.weights, run.source.tokens_NT, outputs)
        outputs.flush()


def _prepare_mtp(run: Run, layer: DecoderLayer, inputs: Activations, prepared: Activations) -> None:
    """Writes the inputs of a multi-token-prediction layer."""
    stream = Stream(run.source.checkpoint.weights, inputs, prepared)
    mtp_inputs(run.source.skeleton, run.source.checkpoint.weights, layer, run.source.tokens_NT, stream)


def _quantized_stream(run: Run, layer: DecoderLayer) -> QuantizedStream:
    """The quantized model's hidden states before and behind a layer."""
    inputs = run.activations(run.quantized_path(layer.index))
    if layer.index >= run.source.skeleton.num_layers:
        prepared = run.activations(run.job.work / "mtp-quantized.f32")
        _prepare_mtp(run, layer, inputs, prepared)
        inputs = prepared
    return QuantizedStream(
        inputs,
        run.outputs(layer.index, run.quantized_path(layer.index + 1)),
        run.mlp_inputs(layer.index, run.job.work / "mlp-inputs-quantized.f32"),
    )


def _quantize_layer(run: Run, unit: Unit, writers: _Writers, safe_point: Callable[[str], None]) -> dict[str, Any]:
    source, layer = run.source, unit.layer
    assert layer is not None
    inputs = run.activations(run.hidden_path(layer.index))
    if layer.index >= source.skeleton.num_layers:
        prepared = run.activations(run.mtp_path)
        run.ranks.once(lambda: _prepare_mtp(run, layer, inputs, prepared))
        inputs = run.activations(run.mtp_path)
    outputs = run.outputs(layer.index, run.hidden_path(layer.index + 1))
    layer_job = LayerJob(
        skeleton=source.skeleton,
        layer=layer,
        weights=source.checkpoint.weights,
        inputs=inputs,
        outputs=outputs,
        mlp_inputs=run.mlp_inputs(layer.index, run.job.work / "mlp-inputs.f32"),
        linears=source.plan.linears_of(layer),
        widths=source.plan.widths,
        steps=run.recipe.steps,
        batch_samples=run.batch_samples,
        seed=run.recipe.seed,
        emit=writers.emit,
        safe_point=safe_point,
        note=writers.note,
        keep_scales=writers.keep_scales,
        quantized=_quantized_stream(run, layer) if run.follows_quantized else None,
        ranks=run.ranks,
    )
    report = quantize_successively(layer_job) if layer_job.quantized else quantize_layer(layer_job)
    made = [outputs, layer_job.quantized.outputs] if layer_job.quantized else [outputs]
    for path, activations in zip(run.kept_paths(layer.index + 1), made, strict=True):
        run.keep(activations, path)
    return {"layer": layer.index, **asdict(report)}
