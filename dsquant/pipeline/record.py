"""What a finished job tells: the record in its output folder, dsquant.json, and the result that callers get."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsquant.evaluation.divergence import Divergence
from dsquant.files.foreign import blaming
from dsquant.files.strict_json import read_json_object
from dsquant.formats.protocol import Target
from dsquant.formats.table import SAFETENSORS, format_of
from dsquant.jobs.folder import RECORD_FILE, Job
from dsquant.jobs.journal import BEGIN_ANEW
from dsquant.packages import PACKAGES, version
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.units import Run
from dsquant.precision.groups import WIDTH_COLUMNS, MixedPlan, width_rows
from dsquant.precision.sensitivity import SENSITIVITY
from dsquant.quantization.mlp_inputs import FEWEST_TOKENS
from dsquant.recipes import Recipe, format_size
from dsquant.reporting.notebook import Shown, as_html, table_of
from dsquant.schemes import Grid
from dsquant.source.vocabulary import surplus_notes

if TYPE_CHECKING:
    from rich.console import RenderableType

# The record's layout. 1: first. 2: hashes of all files and of its own sections; errors of single weights.
RECORD_VERSION = 2
# The errors of a layer's parts, and the share of an output's energy beyond which one is told of.
LAYER_ERRORS = ("attention_error", "mlp_error")
MOST_LOST = 0.25
# The share of a target's bytes below which one is told that it was not used up.
MOST_UNUSED = 0.97


@dataclass(frozen=True)
class Result(Shown):
    """What a quantization run made, and what it cost."""

    output: Path
    folders: dict[str, Path]
    """Format -> checkpoint folder."""
    source_bytes: int
    """Of the data of the source's tensors, without the files' headers."""
    bf16_bytes: int
    """What the source would take in BF16: the 4-bit formats keep in BF16 what they do not quantize."""
    output_bytes: dict[str, int]
    """Format -> bytes of its shards."""
    divergence: dict[str, dict[str, Divergence]]
    """Format -> text -> distance from the original; empty where evaluation was off."""
    warnings: list[str]
    precision: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group of linears, or GGUF tensor -> its width or type, bytes and error, where these were chosen."""
    already_finished: bool = False
    elapsed_s: float = 0.0
    peak_resident_bytes: int = 0
    peak_gpu_bytes: int = 0

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

    def tables(self) -> "Iterator[RenderableType]":
        """What rich prints of it: sizes, distances from the original, notes, and how to serve it."""
        from rich.text import Text

        if self.already_finished:
            yield f"{self.output} is finished already; nothing to do"
        sizes = {"original": self.source_bytes, "original as BF16": self.bf16_bytes, **self.output_bytes}
        rows = [(name, format_size(size), f"{size / self.source_bytes:.1%}") for name, size in sizes.items()]
        yield table_of(f"{self.output}", ("checkpoint", "size", "of original"), rows)
        if self.precision:
            yield table_of("chosen by sensitivity", WIDTH_COLUMNS, width_rows(self.precision))
        for name, texts in self.divergence.items():
            title = f"{name} against the original, on held-out texts"
            yield table_of(title, DISTANCES, [(text, *_distances(found)) for text, found in texts.items()])
        yield from (f"Note: {warning}." for warning in self.warnings)
        for name in (name for name, size in self.output_bytes.items() if size > self.source_bytes):
            reason = "its types have more bits than the original's"
            if not format_of(name).has_types:
                kept = "what is not quantized (attention, embedding, head, a kept MTP layer)"
                reason = f"{kept} lies in BF16, twice its size in FP8"
            yield f"Note: {name} is larger than the original: {reason}."
        for name, folder in self.folders.items():
            command = format_of(name).serve_command(folder)
            yield Text(f"{name} is in {folder}; serve it with:\n  {command}", overflow="fold", no_wrap=True)
        if not self.already_finished:
            peak = f"{format_size(self.peak_resident_bytes)} of memory"
            if self.peak_gpu_bytes:
                peak += f" and {format_size(self.peak_gpu_bytes)} of GPU memory"
            yield f"Done in {self.elapsed_s:.0f} s, with at most {peak}."


STATES = {
    "new": "new",
    "resume": "exists: an interrupted job, which will be continued",
    "restart": "exists: will be begun anew",
    "finished": "exists: a finished output; nothing to do",
    "interrupted, in the way": "exists: an interrupted job; continue with --resume, start over with --restart",
    "finished, in the way": "exists: a finished output; start over with --restart, or name another folder",
}
DISTANCES = ("text", "tokens", "perplexity, original", "perplexity", "mean KL, nats", "same top token")


def _distances(found: Divergence) -> tuple[str, ...]:
    return (
        str(found.tokens),
        f"{found.perplexity_original:.3f}",
        f"{found.perplexity:.3f}",
        f"{found.mean_kl:.4f}",
        f"{found.top1_agreement:.1%}",
    )


@dataclass(frozen=True)
class Preview:
    """What a job would make, from headers alone."""

    model: str
    architecture: str
    output: Path
    state: str
    """new, resume, restart or finished: what the output folder holds already."""
    source_bytes: int
    output_bytes: dict[str, int]
    """Format or file -> bytes."""
    details: dict[str, Any]
    calibration: dict[str, Any] | None
    """Where the calibration tokens come from, with their hash; None without calibration."""
    notes: list[str]
    memory_bytes: int
    """Resident memory that the run needs, with what the process holds already."""
    memory_budget_bytes: int
    work_disk_bytes: int
    """Disk for hidden states while the run lasts."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "output": str(self.output)}

    def __str__(self) -> str:
        texts = "none"
        if self.calibration:
            parts = ", ".join(f"{source['name']} {source['samples']}" for source in self.calibration["sources"])
            texts = f"{self.calibration['samples']} samples of {self.calibration['seq_len']} tokens ({parts})"
        rows = {
            "model": f"{self.model} ({self.architecture}, {format_size(self.source_bytes)})",
            "output folder": f"{self.output} ({STATES[self.state]})",
            **{f"  {name}": format_size(size) for name, size in self.output_bytes.items()},
            **self.details,
            "calibration": texts,
            "memory": f"{format_size(self.memory_bytes)} of a budget of {format_size(self.memory_budget_bytes)}",
            "disk beside the output": f"{format_size(self.work_disk_bytes)} for hidden states, while the run lasts",
        }
        width = max(map(len, rows)) + 2
        return "\n".join(
            [f"{name:{width}}{value}" for name, value in rows.items()] + [f"Note: {n}." for n in self.notes]
        )

    def _repr_html_(self) -> str:
        return as_html([str(self)])


def finished_result(recipe: Recipe) -> Result:
    """The result of a job that has finished before.

    Args:
        recipe: the job's recipe.

    Returns:
        The result.

    Raises:
        InputError: where the record in the output folder is not one that dsquant writes.
    """
    path = recipe.output / RECORD_FILE
    record = read_json_object(path, BEGIN_ANEW, finite=False)
    with blaming(path, BEGIN_ANEW):
        result = result_of(recipe, record, already_finished=True)
        list(result.tables())  # what callers will show of it
    return result


def result_of(recipe: Recipe, record: dict[str, Any], **changes: Any) -> Result:
    """The result that a record tells of.

    Args:
        recipe: the job's recipe.
        record: its record.
        **changes: fields of the result that no record holds.

    Returns:
        The result.
    """
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
        precision=record.get("precision", {}),
        **changes,
    )


def output_files(source: Source) -> list[str]:
    """Every file that a job may make, relative to the output folder."""
    names = {RECORD_FILE}
    for target in source.plan.targets:
        names |= {str(target.folder / name) for name in (*target.file_names(), RECORD_FILE)}
    return sorted(names)


def run_record(run: Run, divergence: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything about an output that two runs have in common; times and memory are not in here.

    Args:
        run: the finished run.
        divergence: format -> text -> distance from the original.

    Returns:
        Plain JSON values.
    """
    source, journal = run.source, run.job.journal.units
    weights, targets = source.checkpoint.weights, source.plan.targets
    layers, errors = _layers(journal)
    packages = dict.fromkeys([*PACKAGES, *(name for target in targets for name in target.packages)])
    return {
        "record_version": RECORD_VERSION,
        "recipe": run.recipe.lasting(),
        "recipe_sha256": run.recipe.hash,
        "versions": {name: version(name) for name in packages},
        **{name: value for target in targets for name, value in target.facts.items()},
        "source": {
            "architecture": source.checkpoint.architecture,
            "bytes": source.checkpoint.index.num_bytes,
            "bf16_bytes": 2 * sum(math.prod(weights.shape(name)) for name in weights),
            "tensors_sha256": run.job.notes["tensors"],
        },
        "calibration": source.calibration,
        "outputs": {
            target.name: target.recorded(_weight_errors(target, journal, errors, list(source.plan.linears)))
            for target in targets
        },
        "layers": layers,
        "divergence": divergence,
        "warnings": _warnings(run, layers),
        **_precision(run.job),
    }


def _weight_errors(
    target: Target,
    journal: Mapping[str, Mapping[str, Any]],
    by_grid: Mapping[int, Mapping[str, float]],
    grids: Sequence[Grid],
) -> Mapping[str, float]:
    """An output's own errors where its format rounds itself, else those of its grid."""
    if target.grid.rounded:
        return by_grid[grids.index(target.grid)]
    found: dict[str, float] = {}
    for entry in journal.values():
        found |= entry["weight_errors"].get(str(target.folder), {})
    return found


def _unused(recipe: Recipe, mixed: MixedPlan | None, job: Job) -> list[str]:
    """What a user should know where a target's bytes could not be used."""
    if mixed is None or SENSITIVITY not in job.notes:
        return []
    used = sum(entry["bytes"][str(entry["width"])] for entry in job.notes[SENSITIVITY].values())
    if used >= MOST_UNUSED * mixed.budget_bytes:
        return []
    more = ""
    if recipe.to[0] in SAFETENSORS:
        most = max(SAFETENSORS[recipe.to[0]].bits)
        wider = (known for known in SAFETENSORS.values() if max(known.bits) > most)
        more = "".join(f"; --to {known.name} has {max(known.bits)} bits as well" for known in islice(wider, 1))
    sizes = f"{format_size(used)} of {format_size(mixed.budget_bytes)}"
    return [f"{recipe.target}: what is chosen takes {sizes}, no group of linears fits into what is left{more}"]


def _precision(job: Job) -> dict[str, dict[str, Any]]:
    """Where widths were chosen: group -> the width, with its bytes and error, and the errors of all widths."""
    if SENSITIVITY not in job.notes:
        return {}
    chosen = {
        group: {
            "width": entry["width"],
            "bytes": entry["bytes"][str(entry["width"])],
            "error": entry["errors"][str(entry["width"])],
            "errors": entry["errors"],
        }
        for group, entry in job.notes[SENSITIVITY].items()
    }
    return {"precision": chosen}


def _layers(journal: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, dict[str, float]]]:
    """The layers' reports, and grid -> linear -> error, which is told by output and not by layer."""
    layers, errors = [], dict[int, dict[str, float]]()
    for entry in journal.values():
        if "layer" in entry:
            grids = entry["layer"].get("grids", [])
            layers.append({key: value for key, value in entry["layer"].items() if key != "grids"})
            if grids:
                layers[-1]["grids"] = [{k: v for k, v in grid.items() if k != "weight_errors"} for grid in grids]
            for number, grid in enumerate(grids):
                errors.setdefault(number, {}).update(grid["weight_errors"])
    return layers, errors


def planned_warnings(recipe: Recipe, source: Source) -> list[str]:
    """What a user should know before a quantization begins, in words.

    Args:
        recipe: the run's recipe.
        source: the opened model.

    Returns:
        Sentences without a full stop.
    """
    words = [*source.checkpoint.notes, *source.notes]
    if source.tokenizer is not None:  # under recorded scales no text is read
        words += surplus_notes(source.tokenizer)
    if source.calibration is not None and source.calibration["samples"] < recipe.samples:
        words.append(
            f"the calibration texts yield {source.calibration['samples']} samples of {recipe.seq_len} tokens, "
            f"{recipe.samples} were asked for"
        )
    mixed = source.plan.mixed
    widths = (recipe.bits,) if mixed is None else mixed.widths
    for name in recipe.to:
        words += format_of(name).engine_notes(widths, _is_mixture(source), mixed is not None)
    words += [note for target in source.plan.targets for note in target.notes]
    if source.skeleton.num_mtp_layers and recipe.mtp == "drop":
        words.append("the multi-token-prediction layer is dropped: engines cannot draft with it any more")
    return words


def _is_mixture(source: Source) -> bool:
    return any(layer.experts for layer in source.skeleton.layers)


def _warnings(run: Run, layers: list[dict[str, Any]]) -> list[str]:
    words = planned_warnings(run.recipe, run.source)
    counts = [count for layer in layers for count in layer["tokens_per_expert"]]
    topped_up = sum(len(layer["topped_up"]) for layer in layers)
    rare = topped_up if topped_up or "top-up" in run.recipe.steps else sum(count < FEWEST_TOKENS for count in counts)
    if rare and (run.recipe.steps or topped_up):  # plain rounding judges by no token
        on = "their router's next best as well" if topped_up else "these alone"
        words.append(
            f"{rare} of {len(counts)} experts got fewer than {FEWEST_TOKENS} calibration tokens and were judged on "
            f"{on}; more --samples help"
        )
    widths = set(run.source.plan.widths.values())
    if len(widths) > 1:
        words += format_of(run.recipe.to[0]).mixed_notes(widths, _is_mixture(run.source))
    grids = [grid for layer in layers for grid in layer.get("grids", [])]
    lost = sum(any((grid[key] or 0) > MOST_LOST for key in LAYER_ERRORS) for grid in grids)
    if lost:
        words.append(
            f"{lost} layers lost more than {MOST_LOST:.0%} of their output's energy (`layers` in {RECORD_FILE}): their "
            "weights or inputs are out of the range that these groups can hold; do not use the output unmeasured"
        )
    words += _unused(run.recipe, run.source.plan.mixed, run.job)
    fallbacks = sum(len(grid["fallbacks"]) for grid in grids)
    if fallbacks:
        words.append(f"{fallbacks} modules are plainly rounded because the search found nothing better")
    return words
