"""Makes GGUF files: plans every tensor from headers, then fills the files unit by unit; the job can be resumed."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file, save

from dsquant.calibration.texts import check_held_out
from dsquant.errors import InputError, UsageError
from dsquant.files.disk import sync_folder, write_atomically
from dsquant.formats.gguf.files import GgufFiles, GgufTensor
from dsquant.formats.gguf.imatrix import TensorImportance, fitted, read_imatrix, write_imatrix
from dsquant.formats.gguf.target import ELEMENTS_AT_ONCE, GgufTarget, GgufUnitWriter, plan_target
from dsquant.formats.gguf.types import MIXTURES, parse_overrides
from dsquant.formats.scales import keep_scales
from dsquant.jobs.folder import Job
from dsquant.model.activations import Activations
from dsquant.model.complete import check_complete
from dsquant.model.repeated import check_repeated
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import Stream, embed, mtp_inputs, samples_together
from dsquant.model.structure import DecoderLayer
from dsquant.pipeline.inputs import open_calibration, open_model, open_tokenizer
from dsquant.pipeline.memory import FLOAT32_BYTES, head_memory_bytes, host_memory_bytes, layer_memory_bytes
from dsquant.pipeline.plan import GGUF_GRID, Unit, plan_units
from dsquant.pipeline.resume import check_gguf, check_kept, check_units, kept_files
from dsquant.precision.groups import MixedPlan
from dsquant.precision.type_groups import plan_types
from dsquant.quantization.importance import ObservationJob, observe_layer
from dsquant.quantization.layer import KEYS_SUFFIX, quantize_layer
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.statistics import Importance
from dsquant.recipes import GgufRecipe
from dsquant.reporting.progress import Progress, Report, Stage
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.vocabulary import surplus_notes
from dsquant.source.weights import Weights

IMATRIX_FILE = "imatrix.gguf"


@dataclass(frozen=True)
class GgufPlan:
    """A model to convert, opened, checked and planned from headers."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    units: tuple[Unit, ...]
    target: GgufTarget
    linears: frozenset[str]
    """The linears whose inputs are scaled; empty where nothing is."""
    imatrix: dict[str, TensorImportance] | None
    """From a file; None where there is none."""
    tokenizer: Any
    tokens_NT: torch.Tensor | None
    """Calibration tokens; None without calibration."""
    calibration: dict[str, Any] | None
    other_notes: tuple[str, ...]
    memory_bytes: int
    mixed: MixedPlan[str] | None = None
    """What a target for size or bits leaves to choose."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in words."""
        return self.target.notes + self.other_notes

    @property
    def disk_bytes(self) -> int:
        """Disk for the files and, while the job lasts, for hidden states."""
        files = self.target.num_bytes if self.mixed is None else max(self.target.num_bytes, self.mixed.total_bytes)
        return files + self.work_bytes

    @property
    def work_bytes(self) -> int:
        """Disk for hidden states while the job lasts."""
        if self.tokens_NT is None:
            return 0
        return 3 * self.tokens_NT.numel() * int(self.skeleton.config["hidden_size"]) * FLOAT32_BYTES


def plan_gguf(recipe: GgufRecipe) -> GgufPlan:
    """Opens and validates everything a conversion reads, and plans its files to the byte.

    Args:
        recipe: the conversion, its device resolved.

    Returns:
        The plan.

    Raises:
        InputError: where model, tokenizer, texts or imatrix are missing, damaged or contradict each other.
        UsageError: where the type is unknown, nothing installed can make it, or no types meet a target.
    """
    if recipe.type not in MIXTURES:
        raise UsageError(f"type {recipe.type!r} is unknown; dsquant writes {', '.join(MIXTURES)}")
    if recipe.imatrix and recipe.texts:
        raise UsageError("give an imatrix file or a calibration text, not both")
    checkpoint, skeleton = open_model(recipe.model, torch.device(recipe.device))
    check_complete(checkpoint, skeleton, recipe.mtp)
    units = plan_units(recipe.mtp, checkpoint, skeleton)
    target = gguf_target(recipe, checkpoint, skeleton, units, {})
    mixed = plan_types(recipe, checkpoint, skeleton.layers[: skeleton.num_layers], target.tensors)
    notes = [*checkpoint.notes, *check_repeated(checkpoint, skeleton)]
    if skeleton.num_mtp_layers and recipe.mtp == "drop":
        notes.append("the multi-token-prediction layer is left out (--mtp keep writes it, for llama.cpp of 2026 on)")
    imatrix = None
    if recipe.imatrix:
        imatrix, found = _fitting_imatrix(recipe.imatrix, target.tensors)
        notes += found
    tokenizer = open_tokenizer(checkpoint)
    notes += surplus_notes(tokenizer)
    if recipe.evaluate:
        check_held_out(tokenizer)
    tokens_NT, calibration = open_calibration(recipe, recipe.texts, tokenizer) if recipe.texts else (None, None)
    linears = frozenset[str]()
    if recipe.texts and recipe.scales:
        linears, found = scalable_linears(checkpoint, skeleton)
        notes += found
    tokens = None if tokens_NT is None else (tokens_NT.shape[0], tokens_NT.shape[1])
    memory = gguf_memory_bytes(checkpoint, skeleton, target.largest_whole, tokens, linears)
    return GgufPlan(
        checkpoint,
        skeleton,
        units,
        target,
        linears,
        imatrix,
        tokenizer,
        tokens_NT,
        calibration,
        tuple(notes),
        memory,
        mixed,
    )


def gguf_target(
    recipe: GgufRecipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    units: tuple[Unit, ...],
    types: Mapping[str, str],
) -> GgufTarget:
    """Plans the files to the byte.

    Args:
        recipe: the conversion.
        checkpoint: the source.
        skeleton: its network.
        units: the units of work.
        types: tensor -> the type that was chosen for it; nothing before any is.

    Returns:
        The plan.

    Raises:
        InputError: where a parameter has no place in GGUF, or the tokenizer is unknown to llama.cpp.
        UsageError: where nothing installed can quantize to a type.
    """
    chosen = [(re.compile(f"^{re.escape(name)}$"), type_name) for name, type_name in types.items()]
    return plan_target(
        checkpoint,
        Path(recipe.model).name,
        recipe.type,
        [name for unit in units if unit.action != "drop" for name in unit.parameters],
        skeleton.num_mtp_layers if recipe.mtp == "keep" else 0,
        bool(recipe.imatrix or recipe.texts),
        [*parse_overrides(recipe.tensor_types), *chosen],
        recipe.split_max_bytes,
        recipe.target_name,
    )


def gguf_memory_bytes(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    largest_whole: int,
    tokens: tuple[int, int] | None,
    linears: frozenset[str],
) -> int:
    """What a conversion needs beyond what the process has when it starts.

    Args:
        checkpoint: the source.
        skeleton: its network.
        largest_whole: weights of the largest parameter that is not stored in parts.
        tokens: calibration samples, and tokens of each; None without calibration.
        linears: those whose inputs are scaled.

    Returns:
        Bytes of resident memory.
    """
    memory = 6 * FLOAT32_BYTES * max(ELEMENTS_AT_ONCE, largest_whole)
    if tokens is None:
        return memory
    samples, seq_len = tokens
    needs = layer_memory_bytes(samples * seq_len, seq_len, checkpoint, skeleton, linears)
    layer = max(head_memory_bytes(skeleton), *needs.values())
    return max(memory, layer + host_memory_bytes(samples * seq_len * skeleton.config["hidden_size"]))


def scalable_linears(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[frozenset[str], list[str]]:
    """Finds the linears that GGUF's scales are searched for: those of every layer, or none.

    Args:
        checkpoint: the source.
        skeleton: its network.

    Returns:
        The linears, and what to tell where scales cannot be searched for all of them.
    """
    linears = frozenset(linear for layer in skeleton.layers for linear in layer.linears)
    for linear in sorted(linears):
        columns = checkpoint.weights.shape(f"{linear}.weight")[1]
        if columns % GGUF_GRID.group_size:
            size = GGUF_GRID.group_size
            return frozenset(), [f"no scales are folded in: {linear} has {columns} columns, not a multiple of {size}"]
    return linears, []


def _fitting_imatrix(path: Path, tensors: Mapping[str, GgufTensor]) -> tuple[dict[str, TensorImportance], list[str]]:
    entries = read_imatrix(path)
    unknown = [name for name in entries if name not in tensors]
    if len(unknown) * 2 > len(entries):
        raise InputError(
            f"{path}: {len(unknown)} of its {len(entries)} tensors, such as {unknown[0]!r}, are not in this model; the "
            "imatrix is of another one"
        )
    found = {name: fitted(path, name, tensors[name].shape, entry) for name, entry in entries.items() if name in tensors}
    quantized = [name for name, tensor in tensors.items() if len(tensor.shape) > 1 and tensor.type_name != "F32"]
    covered = sum(name in found for name in quantized)
    starved = sum(int((entry.counts_M == 0).sum()) for entry in found.values())
    notes = [f"the imatrix covers {covered} of {len(quantized)} tensors; the others weigh all columns alike"]
    if starved:
        notes.append(f"{starved} experts' matrices have no token in the imatrix; they take their tensor's mean")
    return found, notes


@dataclass
class GgufRun:
    """A running conversion."""

    recipe: GgufRecipe
    plan: GgufPlan
    job: Job
    report: Report
    check: Callable[[], None]
    files: GgufFiles = field(init=False)
    """Open once every tensor has its type."""
    bytes_written: int = 0
    tokens_done: int = 0

    def safe_point(self, stage: Stage, done: int, total: int, what: str) -> None:
        """Tells where the job is, and stops it if it must."""
        self.check()
        self.tell(stage, done, total, what)

    def tell(self, stage: Stage, done: int, total: int, what: str, layer: dict[str, Any] | None = None) -> None:
        """Tells where the job is, and what came of a finished layer."""
        counts = (self.plan.checkpoint.index.bytes_read, self.bytes_written, self.tokens_done)
        self.report(Progress(stage, done, total, what, *counts, layer=layer))

    @property
    def batch_samples(self) -> int:
        """Samples that pass attention together."""
        return samples_together(self.recipe.seq_len)

    def activations(self, name: str) -> Activations:
        """The activations in a file of the work folder, float32 since outputs are summed there."""
        tokens_NT = self.plan.tokens_NT
        assert tokens_NT is not None
        shape = (*tokens_NT.shape, int(self.plan.skeleton.config["hidden_size"]))
        return Activations.in_file(self.job.work / name, shape, self.plan.checkpoint.weights.device, torch.float32)


def convert_to_gguf(run: GgufRun) -> None:
    """Fills the files with every unit that the journal does not have yet.

    Args:
        run: the running job.

    Raises:
        InputError: where what finished units have left is damaged.
        Interrupted: at a safe point, where the job has to stop; finished units are kept.
    """
    units = [unit for unit in run.plan.units if unit.action != "drop"]
    if run.job.journal.units:
        _check_left(run, units)
    for number, unit in enumerate(units):
        if unit.name not in run.job.journal.units:

            def safe_point(what: str, number: int = number) -> None:
                run.safe_point("quantize", number, len(units), what)

            _make_unit(run, unit, safe_point)
        layer = run.job.journal.units[unit.name].get("layer")
        if layer is not None and run.plan.tokens_NT is not None:
            run.tokens_done += run.plan.tokens_NT.numel()
            run.tell("quantize", number + 1, len(units), unit.name, layer)
    run.safe_point("quantize", len(units), len(units), "")


def _check_left(run: GgufRun, units: list[Unit]) -> None:
    """Checks all that the finished units of a resumed job have left."""
    done = run.job.journal.units
    check_units(run.job, [unit.name for unit in units])
    left = [unit for unit in units if unit.name not in done]
    layers = [unit.layer.index for unit in left if unit.layer is not None]
    reads = run.plan.tokens_NT is not None and layers and left[0].name != "embedding"
    check_kept(run.job, [f"hidden-{layers[0]}.f32"] if reads else [], run.check)
    check_gguf(run.job, PurePosixPath("."), run.plan.target.files, run.check)


def work_files(unit: str) -> list[str]:
    """The files in the work folder that hold a unit's scales and importances, where it has any."""
    return [f"scales-{unit}.safetensors", f"imatrix-{unit}.safetensors"]


def _make_unit(run: GgufRun, unit: Unit, safe_point: Callable[[str], None]) -> None:
    plan, notes = run.plan, dict[str, Any]()
    writer = GgufUnitWriter(plan.checkpoint, plan.target, run.files, unit.parameters, plan.imatrix)
    scales: dict[str, torch.Tensor] = {}
    if plan.tokens_NT is not None and unit.name == "embedding":
        outputs = run.activations("hidden-0.f32")
        embed(plan.skeleton, plan.checkpoint.weights, plan.tokens_NT, outputs)
        outputs.flush()
    elif plan.tokens_NT is not None and unit.layer is not None:
        notes["layer"] = _run_layer(run, unit.layer, writer, scales, safe_point)
    writer.copy_rest(safe_point)
    notes["tensors"] = {".": writer.commit()}
    notes["weight_errors"] = {".": writer.weight_errors}
    keep_observed(run.job.work, unit.name, writer.observed)
    keep_scales(run.job.work, unit.name, {".": scales})
    made = f"hidden-{unit.layer.index + 1 if unit.layer is not None else 0}.f32"
    notes["kept"] = kept_files(run.job.work, [*work_files(unit.name), made])
    sync_folder(run.job.work)
    run.bytes_written += writer.bytes_written
    run.job.journal.append(unit.name, **notes)
    if unit.layer is not None:
        (run.job.work / f"hidden-{unit.layer.index}.f32").unlink(missing_ok=True)


_Surroundings = tuple[Skeleton, DecoderLayer, Weights, Activations, Activations, Activations]


def _run_layer(
    run: GgufRun,
    layer: DecoderLayer,
    writer: GgufUnitWriter,
    scales: dict[str, torch.Tensor],
    safe_point: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the original layer; stores its weights as they pass through memory."""
    plan = run.plan
    assert plan.tokens_NT is not None
    weights, inputs = plan.checkpoint.weights, run.activations(f"hidden-{layer.index}.f32")
    if layer.index >= plan.skeleton.num_layers:
        prepared = run.activations("mtp.f32")
        mtp_inputs(plan.skeleton, weights, layer, plan.tokens_NT, Stream(weights, inputs, prepared))
        inputs = prepared
    outputs = run.activations(f"hidden-{layer.index + 1}.f32")

    surroundings = (plan.skeleton, layer, weights, inputs, outputs, run.activations("mlp-inputs.f32"))
    try:
        if plan.linears:
            return _scale(run, surroundings, writer, scales, safe_point)
        return _observe_importance(run, surroundings, writer, safe_point)
    finally:
        outputs.flush()


def _scale(
    run: GgufRun,
    surroundings: _Surroundings,
    writer: GgufUnitWriter,
    scales: dict[str, torch.Tensor],
    safe_point: Callable[[str], None],
) -> dict[str, Any]:
    """Searches AWQ's scales and stores the folded weights."""

    def emit(_: Grid, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        assert isinstance(value, torch.Tensor)
        writer.write(name, value)

    def note(_: Grid, linear: str, importance: Importance) -> None:
        note_importance(writer, linear, importance)

    def keep(_: Grid, producer: str, scales_I: torch.Tensor) -> None:
        scales[producer] = scales_I.cpu()

    layer = surroundings[1]
    linears = {GGUF_GRID: run.plan.linears.intersection(layer.linears)}
    job = LayerJob(*surroundings, linears, run.batch_samples, run.recipe.seed, emit, safe_point, note, keep)
    return {"layer": layer.index, **asdict(quantize_layer(job))}


def _observe_importance(
    run: GgufRun, surroundings: _Surroundings, writer: GgufUnitWriter, safe_point: Callable[[str], None]
) -> dict[str, Any]:
    """Stores the original weights, by their importance."""

    def emit(linear: str, weight: torch.Tensor, importance: Importance) -> None:
        note_importance(writer, linear, importance)
        writer.write(f"{linear}.weight", weight)

    found = observe_layer(ObservationJob(*surroundings, run.batch_samples, emit, safe_point))
    for linear, importance in found.attention.items():
        note_importance(writer, linear, importance)
    counts = {"tokens_per_expert": found.tokens_per_expert, "topped_up": found.topped_up}
    return {"layer": surroundings[1].index, **counts}


def note_importance(writer: GgufUnitWriter, linear: str, importance: Importance) -> None:
    """Hands a linear's importance to a writer.

    Args:
        writer: the unit's.
        linear: its name, or kv_b_proj's with `KEYS_SUFFIX`.
        importance: of its inputs.
    """
    writer.note(
        f"{linear.removesuffix(KEYS_SUFFIX)}.weight",
        importance.squares_I,
        importance.count,
        keys=linear.endswith(KEYS_SUFFIX),
    )


def keep_observed(work: Path, unit: str, observed: Mapping[str, TensorImportance]) -> None:
    """Lays a unit's importances into the work folder, for the imatrix file at the end.

    Args:
        work: the job's work folder.
        unit: the unit's name.
        observed: GGUF tensor -> importance.
    """
    if not observed:
        return
    flat: dict[str, torch.Tensor] = {}
    for name, entry in observed.items():
        flat |= {f"{name}.sums": entry.sums_MI, f"{name}.counts": entry.counts_M}
    write_atomically(work / f"imatrix-{unit}.safetensors", save(flat))


def write_observed_imatrix(work: Path, folder: Path, units: tuple[Unit, ...], calibration: Mapping[str, Any]) -> None:
    """Writes the calibration's importances as a file that `llama-quantize` accepts.

    Args:
        work: the job's work folder.
        folder: where the file goes.
        units: the job's units.
        calibration: what the tokens were.
    """
    entries: dict[str, TensorImportance] = {}
    for unit in units:
        path = work / f"imatrix-{unit.name}.safetensors"
        flat: dict[str, torch.Tensor] = load_file(path) if path.is_file() else {}
        for name in (key.removesuffix(".sums") for key in flat if key.endswith(".sums")):
            entries[name] = TensorImportance(flat[f"{name}.sums"], flat[f"{name}.counts"])
    datasets = [source["name"] for source in calibration["sources"]]
    write_imatrix(folder / IMATRIX_FILE, entries, datasets, calibration["samples"], calibration["seq_len"])
