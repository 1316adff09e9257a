"""What a run will do and make, worked out from headers alone: units of work, exact output tensors, its needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from dsquant.errors import UsageError
from dsquant.formats.gguf.files import GgufTensor
from dsquant.formats.gguf.target import GgufTarget, plan_target
from dsquant.formats.gguf.types import MIXTURES
from dsquant.formats.protocol import NO_WIDTHS, Format
from dsquant.formats.shards import ShardPlan, StoredTensor, plan_shards
from dsquant.formats.table import FORMATS
from dsquant.model.complete import COMPUTED_SUFFIX, check_complete
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import EMBEDDING
from dsquant.model.structure import DecoderLayer, layer_number
from dsquant.pipeline.memory import (
    BFLOAT16_BYTES,
    CUDA_HOST_BYTES,
    FLOAT32_BYTES,
    head_memory_bytes,
    host_memory_bytes,
    layer_memory_bytes,
    pair_memory_bytes,
    passing_bytes,
    sharing_memory_bytes,
)
from dsquant.precision.groups import MixedPlan, plan_mixed
from dsquant.recipes import Recipe
from dsquant.schemes import UNQUANTIZED, Grid
from dsquant.source.checkpoint import Checkpoint

# How the step is named where it is refused, and what to do then.
FOLLOW = "step follow (of preset best)"
WITHOUT_FOLLOW = "take --preset compact, or leave the step out of --steps"
# What scales are searched on for GGUF: 4 bits with scale and minimum for 32 weights, as Q4_K has.
GGUF_GRID = Grid(4, 32, False, rounded=False)

Action = Literal["copy", "quantize", "drop"]


@dataclass(frozen=True)
class Unit:
    """A part of the model that is finished, and journaled, in one go."""

    name: str
    parameters: tuple[str, ...]
    action: Action
    layer: DecoderLayer | None = None
    """The decoder layer, where the unit is one."""


@dataclass(frozen=True)
class Target:
    """One output checkpoint."""

    format: Format
    grid: Grid
    folder: PurePosixPath
    """Inside the output folder; `.` where there is one format."""
    shards: ShardPlan
    widths: Mapping[str, int] = field(default_factory=dict)
    """Quantized linear -> bits, where widths were chosen; else all have the grid's."""

    def grid_of(self, linear: str) -> Grid:
        """The grid of a quantized linear."""
        return self.grid.with_bits(self.widths.get(linear, self.grid.bits))


@dataclass(frozen=True)
class Plan:
    """Everything about a run that headers tell."""

    units: tuple[Unit, ...]
    targets: tuple[Target, ...]
    gguf: Mapping[PurePosixPath, GgufTarget]
    """Folder inside the output folder -> GGUF model."""
    linears: Mapping[Grid, frozenset[str]]
    """Grid -> the linears that are quantized onto it."""
    dtypes: Mapping[str, str]
    """Parameter -> safetensors dtype in which it is stored where it is not quantized."""
    memory_bytes: int
    """Resident memory that the run needs beyond what the process has when it starts."""
    gpu_memory_bytes: int
    """GPU memory that the run needs; 0 on a CPU."""
    gpu_resident: frozenset[int]
    """The layers whose hidden states stay on the GPU while their experts pass."""
    work_bytes: int
    """Disk for hidden states while the run lasts."""
    mixed: MixedPlan[int] | None = None
    """What a target for size or bits leaves to choose."""

    @property
    def disk_bytes(self) -> int:
        """Disk for the output and, while the run lasts, for hidden states."""
        files = sum(target.shards.num_bytes for target in self.targets)
        if self.mixed is not None:
            files = max(files, self.mixed.total_bytes)
        return self.work_bytes + files + sum(target.num_bytes for target in self.gguf.values())

    @property
    def gguf_tensors(self) -> list[GgufTensor]:
        """The tensors of all GGUF models."""
        return [tensor for target in self.gguf.values() for tensor in target.tensors.values()]

    @property
    def widths(self) -> Mapping[str, int]:
        """Quantized linear -> bits, where widths were chosen; there is one output then."""
        return self.targets[0].widths if self.targets else NO_WIDTHS

    def linears_of(self, layer: DecoderLayer) -> dict[Grid, frozenset[str]]:
        """Grid -> a layer's linears that are quantized onto it."""
        return {grid: linears.intersection(layer.linears) for grid, linears in self.linears.items()}


def plan_run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    gpu_budget_bytes: int = 0,
    num_ranks: int = 1,
    widths: Mapping[str, int] = NO_WIDTHS,
) -> Plan:
    """Plans a quantization run.

    Args:
        recipe: the run's recipe.
        checkpoint: the source.
        skeleton: its network.
        gpu_budget_bytes: the most GPU memory; where it suffices, hidden states stay there.
        num_ranks: how many processes share the run; memory is planned for one of them.
        widths: linear -> bits that were chosen for it, 16 where it stays as it is; nothing before they are.

    Returns:
        The plan.

    Raises:
        InputError: where the source's tensors are not what its config promises.
        UsageError: where a format cannot store what the recipe asks for.
    """
    check_complete(checkpoint, skeleton, recipe.mtp)
    _check_choosing(recipe)
    by_preset = _quantized_linears(recipe, skeleton)
    linears = by_preset.difference(linear for linear, width in widths.items() if width == UNQUANTIZED)
    units = plan_units(recipe.mtp, checkpoint, skeleton)
    dtypes = {name: _plain_dtype(checkpoint, name) for name in checkpoint.weights}
    folders = {name: PurePosixPath(name.partition(":")[0] if len(recipe.to) > 1 else ".") for name in recipe.to}
    targets = tuple(
        _target(recipe, name, folder, checkpoint, skeleton, units, linears, dtypes, widths)
        for name, folder in folders.items()
        if name in FORMATS
    )
    gguf = {
        folders[name]: _gguf_target(recipe, name, checkpoint, skeleton, units)
        for name in recipe.to
        if name not in FORMATS
    }
    if len(gguf) < len(recipe.to) - len(targets):
        raise UsageError("--to gguf:TYPE can be given once; run `dsquant gguf` for further types")
    by_grid = {target.grid: linears for target in targets}
    if gguf:
        by_grid[GGUF_GRID] = frozenset(linear for layer in _touched(recipe, skeleton) for linear in layer.linears)
    _check_steps(recipe, by_grid, skeleton)
    mixed = None
    if recipe.target is not None:
        kept = [name for unit in units if unit.action != "drop" for name in unit.parameters]
        (target,) = targets
        mixed = plan_mixed(
            recipe, target.format, target.grid, _touched(recipe, skeleton), by_preset, checkpoint, dtypes, kept
        )
    everything = frozenset().union(*by_grid.values())
    follows = "follow" in recipe.steps
    streams = 2 if follows else 1
    num_hidden = recipe.samples * recipe.seq_len * skeleton.config["hidden_size"]
    head = head_memory_bytes(skeleton)
    rounded = [linears for grid, linears in by_grid.items() if grid.rounded and "compensate" in recipe.steps]
    compensated, num_tokens = frozenset[str]().union(*rounded), recipe.samples * recipe.seq_len
    needs = layer_memory_bytes(num_tokens, recipe.seq_len, checkpoint, skeleton, everything, compensated, len(by_grid))
    shared = sharing_memory_bytes(num_tokens, checkpoint, skeleton, everything, compensated, num_ranks)
    pairs = pair_memory_bytes(checkpoint, skeleton) if follows else 0
    needs = {layer: need + shared + pairs for layer, need in needs.items()}
    memory, gpu_memory = max(head, *needs.values()) + host_memory_bytes(num_hidden, streams), 0
    resident = frozenset[int]()
    if recipe.device == "cuda":
        hidden = streams * skeleton.config["hidden_size"] * passing_bytes(recipe.samples, recipe.seq_len, num_ranks)
        resident = frozenset(layer for layer, need in needs.items() if need + hidden <= gpu_budget_bytes)
        gpu_memory = max(head, *(need + hidden * (layer in resident) for layer, need in needs.items()))
        memory = CUDA_HOST_BYTES + host_memory_bytes(num_hidden, streams)
    prepares = recipe.mtp == "quantize" and skeleton.num_mtp_layers > 0
    work_bytes = streams * num_hidden * _kept_bytes(recipe.device, len(resident) == len(needs), prepares)
    return Plan(units, targets, gguf, by_grid, dtypes, memory, gpu_memory, resident, work_bytes, mixed)


def _kept_bytes(device: str, resident: bool, prepares: bool) -> int:
    """Bytes in files for each hidden value while a layer is made: its inputs, its outputs, what its MLPs read.

    A multi-token-prediction layer's inputs are prepared in one more file.
    """
    if device != "cuda":
        return (3 + prepares) * FLOAT32_BYTES
    return (2 + prepares) * BFLOAT16_BYTES + (0 if resident else BFLOAT16_BYTES + FLOAT32_BYTES)


def _check_choosing(recipe: Recipe) -> None:
    """Refuses what widths are not chosen for."""
    if recipe.target is None:
        return
    option = "--target-bits" if recipe.target_bits is not None else "--target-size"
    if len(recipe.to) > 1 or recipe.to[0] not in FORMATS:
        raise UsageError(
            f"{option} chooses for one format, {' or '.join(FORMATS)}; found --to {', '.join(recipe.to)}. "
            "For GGUF's types run `dsquant gguf` with it"
        )
    if "follow" in recipe.steps:
        raise UsageError(f"{option}: no widths are chosen with {FOLLOW}; {WITHOUT_FOLLOW}")
    if recipe.mtp == "quantize":
        raise UsageError(f"{option}: no width is chosen for a multi-token-prediction layer; take --mtp keep or drop")


def _check_steps(recipe: Recipe, by_grid: Mapping[Grid, frozenset[str]], skeleton: Skeleton) -> None:
    """Refuses steps that do nothing here, and what the step `follow` cannot do: it follows one quantized model."""
    mixture = any(layer.experts for layer in skeleton.layers)
    if "gate-weights" in recipe.steps and not mixture:
        raise UsageError("step gate-weights: this model has no routed experts; leave the step out of --steps")
    if "follow" in recipe.steps and GGUF_GRID in by_grid:
        raise UsageError(
            f"{FOLLOW}: GGUF rounds its weights itself; take --preset compact, or leave the step out of --steps, and "
            "descend with it"
        )
    if "descend" in recipe.steps and not any(grid.rounded for grid in by_grid):
        raise UsageError("step descend: GGUF rounds its weights itself; leave the step out of --steps")
    if "follow" not in recipe.steps:
        return
    if mixture and recipe.preset in (None, "quality"):
        raise UsageError(f"{FOLLOW} rounds every linear, preset quality does not; take --preset best, or compact")
    if len(by_grid) > 1:
        raise UsageError(
            f"{FOLLOW} follows one quantized model, {' and '.join(recipe.to)} have different grids; add --symmetric, "
            "or make each in its own run"
        )


def _touched(recipe: Recipe, skeleton: Skeleton) -> tuple[DecoderLayer, ...]:
    return skeleton.layers if recipe.mtp == "quantize" else skeleton.layers[: skeleton.num_layers]


def _gguf_target(
    recipe: Recipe, name: str, checkpoint: Checkpoint, skeleton: Skeleton, units: tuple[Unit, ...]
) -> GgufTarget:
    type_name = name.partition(":")[2]
    if type_name not in MIXTURES:
        raise UsageError(f"--to {name}: dsquant writes gguf: with {', '.join(MIXTURES)}")
    for layer in skeleton.layers[: skeleton.num_layers]:
        for linear in layer.linears:
            columns = checkpoint.weights.shape(f"{linear}.weight")[1]
            if columns % GGUF_GRID.group_size:
                raise UsageError(
                    f"--to {name}: {linear} has {columns} columns, not a multiple of {GGUF_GRID.group_size}, so scales "
                    "cannot be searched for it; run `dsquant gguf` with --calibration instead"
                )
    parameters = [parameter for unit in units if unit.action != "drop" for parameter in unit.parameters]
    num_mtp_layers = 0 if recipe.mtp == "drop" else skeleton.num_mtp_layers
    return plan_target(checkpoint, Path(recipe.model).name, type_name, parameters, num_mtp_layers, True)


def _quantized_linears(recipe: Recipe, skeleton: Skeleton) -> frozenset[str]:
    layers = _touched(recipe, skeleton)
    mixture = any(layer.experts for layer in layers)
    if (recipe.preset or "quality") == "quality" and mixture:
        return frozenset(linear for layer in layers for mlp in layer.experts for linear in mlp.linears)
    return frozenset(linear for layer in layers for linear in layer.linears)


def plan_units(mtp: str, checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[Unit, ...]:
    """Divides a model into units of work.

    Args:
        mtp: `keep`, `quantize` or `drop` the multi-token-prediction layers.
        checkpoint: the source.
        skeleton: its network.

    Returns:
        Embedding, decoder layers, head, MTP layers, in this order.
    """
    names = [name for name in checkpoint.weights if not name.endswith(COMPUTED_SUFFIX)]
    per_layer: dict[int, list[str]] = {layer.index: [] for layer in skeleton.layers}
    rest = []
    for name in names:
        number = layer_number(name)
        if number is not None:
            per_layer[number].append(name)
        elif name != EMBEDDING:
            rest.append(name)
    decoder = [
        Unit(layer.prefix, tuple(per_layer[layer.index]), "quantize", layer)
        for layer in skeleton.layers[: skeleton.num_layers]
    ]
    actions: dict[str, Action] = {"keep": "copy", "quantize": "quantize", "drop": "drop"}
    extra = [
        Unit(layer.prefix, tuple(per_layer[layer.index]), actions[mtp], layer)
        for layer in skeleton.layers[skeleton.num_layers :]
    ]
    return (Unit("embedding", (EMBEDDING,), "copy"), *decoder, Unit("head", tuple(rest), "copy"), *extra)


def _plain_dtype(checkpoint: Checkpoint, name: str) -> str:
    stored = checkpoint.index[name].dtype
    return "BF16" if stored == "F8_E4M3" else stored


def default_symmetric(format_name: str, mixture: bool) -> bool:
    """Whether a format's engines want no zero points: vLLM's mixture kernels take compressed-tensors only so."""
    return format_name == "compressed-tensors" and mixture


def _target(
    recipe: Recipe,
    name: str,
    folder: PurePosixPath,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    units: tuple[Unit, ...],
    linears: frozenset[str],
    dtypes: Mapping[str, str],
    widths: Mapping[str, int],
) -> Target:
    output_format = FORMATS[name]
    symmetric = recipe.symmetric
    if symmetric is None:
        symmetric = default_symmetric(name, any(layer.experts for layer in skeleton.layers))
    grid = Grid(recipe.bits, recipe.group_size, symmetric)
    shapes = {linear: _matrix(checkpoint.weights.shape(f"{linear}.weight")) for linear in sorted(linears)}
    output_format.check(grid, shapes)

    def stored(parameter: str) -> list[StoredTensor]:
        linear = parameter.removesuffix(".weight")
        if linear in linears:
            return output_format.stored(linear, shapes[linear], grid.with_bits(widths.get(linear, grid.bits)))
        return [StoredTensor(parameter, dtypes[parameter], checkpoint.weights.shape(parameter))]

    tensors = [
        (unit.name, [tensor for parameter in unit.parameters for tensor in stored(parameter)])
        for unit in units
        if unit.action != "drop"
    ]
    chosen = {linear: widths[linear] for linear in shapes if linear in widths}
    return Target(output_format, grid, folder, plan_shards(tensors, recipe.max_shard_bytes), chosen)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]
