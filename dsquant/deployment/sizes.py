"""Computes the size of a model in every format and preset, each planned exactly as the job plans its files."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dsquant.deployment.subject import Subject
from dsquant.errors import InputError, UsageError
from dsquant.formats.gguf.files import GgufFile
from dsquant.formats.gguf.output import SCALES_GRID, scalable_linears
from dsquant.formats.gguf.target import choose_tensors, largest_whole, loadable_shapes, plan_model, storing_bytes
from dsquant.formats.gguf.types import FLOAT_TYPES, MIXTURES
from dsquant.formats.output_shards import Shard
from dsquant.formats.safetensors_target import only_checkpoint
from dsquant.formats.table import SAFETENSORS, format_of
from dsquant.model.kinds import kind_of
from dsquant.pipeline.inputs import has_fp8_blocks, rest_of, with_group_size
from dsquant.pipeline.memory import Workload, run_needs
from dsquant.pipeline.planning import Plan, plan_run, plan_units
from dsquant.recipes import Recipe, gguf_recipe

SOURCE = "source"
PRESETS = ("quality", "compact")
# Only planned, never written: a recipe has to name some folder.
NOWHERE = Path("planned")


@dataclass(frozen=True)
class OutputSize:
    """One output of dsquant, or the source."""

    format: str
    """`source`, or what `--to` calls it."""
    preset: str | None
    bits: int | None
    """The value of `--bits`, where the format has a choice."""
    mtp: str
    """Handling of the multi-token-prediction layer: keep, quantize, drop; none where the model has none."""
    num_bytes: int
    """Size of the weight files; of their tensors alone where `exact` is false."""
    exact: bool
    """Whether the files have this size to the byte."""
    by_kind: dict[str, int]
    """Kind -> bytes of tensor data, with the names of `dsquant.model.kinds`."""
    memory_bytes: int
    """Resident memory to build it, beyond the process itself."""
    work_bytes: int
    """Disk for hidden states while it is built."""
    folder: str
    """The output folder of its command, or the source: the model argument of an engine."""
    command: str | None
    """The command that builds it; None for the source."""
    fp8: bool = False
    """Whether linears of it are in FP8 blocks."""

    @property
    def name(self) -> str:
        """Short name for tables: `compressed-tensors quality`."""
        bits = f" {self.bits}-bit" if self.bits not in (None, 4) else ""
        return self.format + (f" {self.preset}" if self.preset else "") + bits

    @property
    def placement(self) -> str:
        """How engines place it: `Format.placement`; those that run a format of safetensors run the source as well."""
        return "parallel" if self.format == SOURCE else format_of(self.format).placement

    @property
    def served_bytes(self) -> int:
        """Bytes that an engine loads: everything but the multi-token-prediction layer."""
        return sum(self.by_kind.values()) - self.by_kind.get("MTP", 0)


def output_sizes(subject: Subject) -> tuple[tuple[OutputSize, ...], tuple[str, ...]]:
    """Plans every output; returns the source and all outputs, and those that cannot be built, in words."""
    refused: list[str] = []
    sizes = [_source_size(subject)]
    presets = PRESETS if any(layer.experts for layer in subject.skeleton.layers) else ("compact",)
    mtp = subject.skeleton.num_mtp_layers > 0
    copied: dict[str, tuple[int, int]] = {}
    for name, preset, bits in ((n, p, b) for n, known in SAFETENSORS.items() for p in presets for b in known.bits):
        try:
            if not SAFETENSORS[name].keeps_mtp:
                plan = _plan(subject, name, preset, bits, "drop")
                size = _safetensors_size(subject, plan, preset, "drop" if mtp else "keep")
                sizes.append(size if mtp else replace(size, mtp="none"))
                continue
            if mtp and name not in copied:
                copied[name] = _mtp_copied(subject, _plan(subject, name, preset, bits, "keep"))
            plan = _plan(subject, name, preset, bits, "quantize")
        except UsageError as error:
            refused.append(f"{name} {preset} {bits} bit: {error}")
            continue
        sizes += _safetensors_sizes(subject, plan, preset, copied.get(name))
    try:
        sizes += list(_gguf_sizes(subject))
    except InputError as error:
        refused.append(f"gguf: {error}")
    return tuple(sizes), tuple(refused)


def _source_size(subject: Subject) -> OutputSize:
    sample = subject.sample
    tensors = ((name, sample.of_tensor(name) * info.num_bytes) for name, info in sample.checkpoint.index.items())
    kinds = _by_kind(subject, tensors)
    mtp = "keep" if subject.skeleton.num_mtp_layers else "none"
    fp8 = has_fp8_blocks(subject.checkpoint.config)
    return OutputSize(SOURCE, None, None, mtp, subject.source_bytes, False, kinds, 0, 0, subject.servable, None, fp8)


def _by_kind(subject: Subject, tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, num_bytes in tensors:
        sizes[kind_of(name, subject.skeleton.num_layers)] += num_bytes
    return dict(sizes.most_common())


def _mtp_units(subject: Subject) -> set[str]:
    return {layer.prefix for layer in subject.skeleton.layers[subject.skeleton.num_layers :]}


def _mtp_copied(subject: Subject, plan: Plan) -> tuple[int, int]:
    """Returns the bytes of the MTP layer's files and tensors where it is kept: the same in every output of a format."""
    units = _mtp_units(subject)
    shards = [(shard, times) for shard, times in _shards(subject, plan) if shard.unit in units]
    tensors = sum(times * tensor.num_bytes for shard, times in shards for tensor in shard.tensors)
    return sum(times * shard.num_bytes for shard, times in shards), tensors


def _shards(subject: Subject, plan: Plan) -> Iterator[tuple[Shard, int]]:
    """Yields the files of the planned layers, each with the number of files that it stands for."""
    return ((shard, subject.sample.of_unit(shard.unit)) for shard in only_checkpoint(plan.targets).shards.shards)


def _safetensors_sizes(
    subject: Subject, plan: Plan, preset: str, copied: tuple[int, int] | None
) -> Iterator[OutputSize]:
    """Yields the sizes for each handling of the MTP layer, which affects only its own shards."""
    quantized = _safetensors_size(subject, plan, preset, "quantize")
    if copied is None:
        yield replace(quantized, mtp="none", command=_awq_command(subject, plan, preset, "keep"))
        return
    units = _mtp_units(subject)
    rest = sum(times * shard.num_bytes for shard, times in _shards(subject, plan) if shard.unit not in units)
    kinds = {kind: size for kind, size in quantized.by_kind.items() if kind != "MTP"}
    kept = dict(sorted((kinds | {"MTP": copied[1]}).items(), key=lambda item: -item[1]))
    keep, drop = (_awq_command(subject, plan, preset, mtp) for mtp in ("keep", "drop"))
    yield replace(quantized, mtp="keep", num_bytes=rest + copied[0], by_kind=kept, command=keep)
    yield quantized
    yield replace(quantized, mtp="drop", num_bytes=rest, by_kind=kinds, command=drop)


def _plan(subject: Subject, name: str, preset: str, bits: int, mtp: str) -> Plan:
    rest = rest_of(None, (name,), subject.checkpoint.config)
    fields = {"to": (name,), "preset": preset, "bits": bits, "mtp": mtp, "rest": rest, "device": "cpu"}
    recipe = Recipe.checked(model=subject.model, output=NOWHERE, **fields)
    recipe = with_group_size(recipe, subject.sample.checkpoint.weights)
    return plan_run(recipe, subject.sample.checkpoint, subject.sample.skeleton)


def _safetensors_size(subject: Subject, plan: Plan, preset: str, mtp: str) -> OutputSize:
    target = only_checkpoint(plan.targets)
    shards = list(_shards(subject, plan))
    tensors = ((tensor.name, times * tensor.num_bytes) for shard, times in shards for tensor in shard.tensors)
    return OutputSize(
        format=target.format.name,
        preset=preset,
        bits=target.grid.bits,
        mtp=mtp,
        num_bytes=sum(times * shard.num_bytes for shard, times in shards),
        exact=subject.has_headers,
        by_kind=_by_kind(subject, tensors),
        memory_bytes=plan.needs.memory_bytes,
        work_bytes=plan.needs.work_bytes,
        folder=_awq_folder(subject, plan, preset),
        command=_awq_command(subject, plan, preset, mtp),
        fp8=bool(target.in_blocks),
    )


def _awq_command(subject: Subject, plan: Plan, preset: str, mtp: str) -> str:
    target = only_checkpoint(plan.targets)
    options = f"--to {target.format.name} --preset {preset} --bits {target.grid.bits}"
    chosen = "" if mtp == "keep" else f" --mtp {mtp}"
    options += f"{chosen}{subject.calibration}"
    return f"dsquant awq {subject.argument} {options} --output {_awq_folder(subject, plan, preset)}"


def _awq_folder(subject: Subject, plan: Plan, preset: str) -> str:
    target = only_checkpoint(plan.targets)
    return shlex.quote(f"{subject.name}-{target.format.name}-{preset}-{target.grid.bits}bit")


def _gguf_sizes(subject: Subject) -> Iterator[OutputSize]:
    has_mtp = subject.skeleton.num_mtp_layers > 0
    for mtp in ("drop", "keep") if has_mtp else ("none",):
        yield from _gguf_sizes_with(subject, mtp)


def _gguf_sizes_with(subject: Subject, mtp: str) -> Iterator[OutputSize]:
    checkpoint, skeleton = subject.checkpoint, subject.skeleton
    units = plan_units("drop" if mtp == "drop" else "keep", checkpoint, skeleton)
    parameters = [name for unit in units if unit.action != "drop" for name in unit.parameters]
    num_mtp_layers = skeleton.num_mtp_layers if mtp == "keep" else 0
    shapes = loadable_shapes(checkpoint, parameters)
    sample = subject.sample
    linears, _ = scalable_linears(sample.checkpoint, sample.skeleton)
    headers: dict[tuple[str, ...], bytes] = {}
    storing = storing_bytes(largest_whole(checkpoint, parameters))
    needs = {}
    for calibrated, one in ((False, "F32"), (True, "Q4_K_M")):
        recipe = gguf_recipe(output=NOWHERE, type=one, mtp="keep" if mtp == "keep" else "drop")
        work = Workload(recipe, sample.checkpoint, sample.skeleton, {SCALES_GRID: linears}, storing, linears)
        needs[calibrated] = run_needs(work)
    for type_name in MIXTURES:
        calibrated = type_name not in FLOAT_TYPES
        tensors, _ = choose_tensors(skeleton.config, shapes, type_name, num_mtp_layers, calibrated)
        sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
        if tuple(tensors) not in headers:
            headers[tuple(tensors)] = _gguf_header(subject, parameters, num_mtp_layers, type_name, calibrated)
        header = headers[tuple(tensors)]
        options = f"--type {type_name}" + (" --mtp keep" if mtp == "keep" else "")
        options += subject.calibration if calibrated else ""
        folder = shlex.quote(f"{subject.name}-{type_name}-GGUF")
        yield OutputSize(
            format=f"gguf:{type_name}",
            preset=None,
            bits=None,
            mtp=mtp,
            num_bytes=GgufFile("planned", header, tuple(tensors.values())).num_bytes if header else sum(sizes.values()),
            exact=subject.has_headers and bool(header),
            by_kind=_by_kind(subject, sizes.items()),
            memory_bytes=needs[calibrated].memory_bytes,
            work_bytes=needs[calibrated].work_bytes,
            folder=folder,
            command=f"dsquant gguf {subject.argument} {options} --output {folder}",
        )


def _gguf_header(
    subject: Subject, parameters: list[str], num_mtp_layers: int, type_name: str, calibrated: bool
) -> bytes:
    """Returns a header, as long as that of every type with tensors of the same names, since only numbers of fixed width
    differ; empty without a tokenizer."""
    if not subject.has_tokenizer:
        return b""
    target = plan_model(subject.checkpoint, subject.name, type_name, parameters, num_mtp_layers, calibrated)
    return target.files[0].header
