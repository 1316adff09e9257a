"""What a run will do and make, worked out from headers alone: units of work, exact output tensors, its needs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from dsquant.errors import UsageError
from dsquant.formats.protocol import Target
from dsquant.formats.table import format_of
from dsquant.formats.wanted import NO_CHOICE, Wanted
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
from dsquant.schemes import Grid
from dsquant.source.checkpoint import Checkpoint

# How the step is named where it is refused, and what to do then.
FOLLOW = "step follow (of preset best)"
WITHOUT_FOLLOW = "take --preset compact, or leave the step out of --steps"
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
class Plan:
    """Everything about a run that headers tell."""

    units: tuple[Unit, ...]
    targets: tuple[Target, ...]
    linears: Mapping[Grid, frozenset[str]]
    """Grid -> the linears that are quantized onto it."""
    memory_bytes: int
    """Resident memory that the run needs beyond what the process has when it starts."""
    gpu_memory_bytes: int
    """GPU memory that the run needs; 0 on a CPU."""
    gpu_resident: frozenset[int]
    """The layers whose hidden states stay on the GPU while their experts pass."""
    work_bytes: int
    """Disk for hidden states while the run lasts."""
    mixed: MixedPlan | None = None
    """What a target for size or bits leaves to choose."""

    @property
    def disk_bytes(self) -> int:
        """Disk for the output and, while the run lasts, for hidden states."""
        files = sum(target.num_bytes for target in self.targets)
        return self.work_bytes + (files if self.mixed is None else max(files, self.mixed.total_bytes))

    @property
    def widths(self) -> Mapping[str, int]:
        """Quantized linear -> bits, where widths were chosen; there is one output then."""
        return self.targets[0].widths

    def linears_of(self, layer: DecoderLayer) -> dict[Grid, frozenset[str]]:
        """Grid -> a layer's linears that are quantized onto it."""
        return {grid: linears.intersection(layer.linears) for grid, linears in self.linears.items()}


def plan_run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    gpu_budget_bytes: int = 0,
    num_ranks: int = 1,
    chosen: Mapping[str, Any] = NO_CHOICE,
) -> Plan:
    """Plans a run.

    Args:
        recipe: the run's recipe.
        checkpoint: the source.
        skeleton: its network.
        gpu_budget_bytes: the most GPU memory; where it suffices, hidden states stay there.
        num_ranks: how many processes share the run; memory is planned for one of them.
        chosen: group of linears, or tensor -> the width that was chosen for it; nothing before they are.

    Returns:
        The plan.

    Raises:
        InputError: where the source's tensors are not what its config promises, or a format has no place for one.
        UsageError: where a format cannot store what the recipe asks for.
    """
    check_complete(checkpoint, skeleton, recipe.mtp)
    _check_choosing(recipe)
    units = plan_units(recipe.mtp, checkpoint, skeleton)
    dtypes = {name: _plain_dtype(checkpoint, name) for name in checkpoint.weights}
    layers = _touched(recipe, skeleton)
    folders = _folders(recipe.to)
    wanted = [
        Wanted(
            recipe=recipe,
            name=name,
            folder=folders[name],
            checkpoint=checkpoint,
            skeleton=skeleton,
            parameters={unit.name: unit.parameters for unit in units if unit.action != "drop"},
            layers=layers,
            linears=_by_preset(recipe, layers),
            dtypes=dtypes,
            chosen=chosen,
        )
        for name in recipe.to
    ]
    targets = tuple(format_of(one.name).plan(one) for one in wanted)
    by_grid: dict[Grid, frozenset[str]] = {}
    for target in targets:
        if target.linears:
            by_grid[target.grid] = by_grid.get(target.grid, frozenset()) | target.linears
    _check_together(recipe, targets, by_grid, skeleton)
    _check_steps(recipe, targets, by_grid, skeleton)
    mixed = plan_mixed(recipe, targets[0].choice(wanted[0])) if recipe.target is not None else None
    needs = _needs(recipe, checkpoint, skeleton, targets, by_grid, gpu_budget_bytes, num_ranks)
    return Plan(units, targets, by_grid, needs.memory, needs.gpu_memory, needs.resident, needs.work, mixed)


def _folders(names: tuple[str, ...]) -> dict[str, PurePosixPath]:
    """Where each output goes: into the output folder itself where there is one."""
    if len(names) == 1:
        return {names[0]: PurePosixPath(".")}
    kinds = Counter(name.partition(":")[0] for name in names)
    return {
        name: PurePosixPath(name.replace(":", "-") if kinds[kind] > 1 else kind)
        for name in names
        for kind in [name.partition(":")[0]]
    }


@dataclass(frozen=True)
class _Needs:
    """What a run takes."""

    memory: int
    gpu_memory: int
    resident: frozenset[int]
    """The layers whose hidden states stay on the GPU while their experts pass."""
    work: int
    """Disk for hidden states."""


def _needs(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    targets: tuple[Target, ...],
    by_grid: Mapping[Grid, frozenset[str]],
    gpu_budget_bytes: int,
    num_ranks: int,
) -> _Needs:
    storing = max(target.storing_bytes for target in targets)
    if not recipe.calibration:
        return _Needs(storing, 0, frozenset(), 0)
    everything = frozenset[str]().union(*by_grid.values())
    rounded = [linears for grid, linears in by_grid.items() if grid.rounded and "compensate" in recipe.steps]
    compensated, num_tokens = frozenset[str]().union(*rounded), recipe.samples * recipe.seq_len
    streams = 2 if "follow" in recipe.steps else 1
    num_hidden = num_tokens * skeleton.config["hidden_size"]
    head = head_memory_bytes(skeleton)
    grids = max(1, len(by_grid))
    needs = layer_memory_bytes(num_tokens, recipe.seq_len, checkpoint, skeleton, everything, compensated, grids)
    shared = sharing_memory_bytes(num_tokens, checkpoint, skeleton, everything, compensated, num_ranks)
    pairs = pair_memory_bytes(checkpoint, skeleton) if streams == 2 else 0
    needs = {layer: need + shared + pairs for layer, need in needs.items()}
    memory, gpu_memory = max(storing, max(head, *needs.values()) + host_memory_bytes(num_hidden, streams)), 0
    resident = frozenset[int]()
    if recipe.device == "cuda":
        hidden = streams * skeleton.config["hidden_size"] * passing_bytes(recipe.samples, recipe.seq_len, num_ranks)
        resident = frozenset(layer for layer, need in needs.items() if need + hidden <= gpu_budget_bytes)
        gpu_memory = max(head, *(need + hidden * (layer in resident) for layer, need in needs.items()))
        memory = CUDA_HOST_BYTES + max(storing, host_memory_bytes(num_hidden, streams))
    prepares = recipe.mtp == "quantize" and skeleton.num_mtp_layers > 0
    work = streams * num_hidden * _kept_bytes(recipe.device, len(resident) == len(needs), prepares)
    return _Needs(memory, gpu_memory, resident, work)


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
    if len(recipe.to) > 1:
        raise UsageError(f"{option} chooses for one format; found --to {', '.join(recipe.to)}")
    if "follow" in recipe.steps:
        raise UsageError(f"{option}: no widths are chosen with {FOLLOW}; {WITHOUT_FOLLOW}")


def _check_together(
    recipe: Recipe, targets: tuple[Target, ...], by_grid: Mapping[Grid, frozenset[str]], skeleton: Skeleton
) -> None:
    """Refuses formats that cannot be made in one run."""
    for target in targets:
        if recipe.mtp != "drop" and skeleton.num_mtp_layers and not format_of(target.name).keeps_mtp:
            raise UsageError(
                f"--to {target.name}: its engines take no multi-token-prediction layer; add --mtp drop, or make it in "
                "its own run"
            )
        left = sorted(by_grid.get(target.grid, frozenset()) - target.linears)
        if left:
            raise UsageError(
                f"--to {target.name}: its engines take {left[0]} unquantized, which another of {', '.join(recipe.to)} "
                "quantizes; take --preset quality, or make each in its own run"
            )


def _check_steps(
    recipe: Recipe, targets: tuple[Target, ...], by_grid: Mapping[Grid, frozenset[str]], skeleton: Skeleton
) -> None:
    """Refuses steps that do nothing here, and what the step `follow` cannot do: it follows one quantized model."""
    mixture = any(layer.experts for layer in skeleton.layers)
    if "gate-weights" in recipe.steps and not mixture:
        raise UsageError("step gate-weights: this model has no routed experts; leave the step out of --steps")
    unrounded = next((target.name for target in targets if not target.grid.rounded), None)
    if "follow" in recipe.steps and unrounded:
        raise UsageError(
            f"{FOLLOW}: {unrounded} rounds its weights itself; take --preset compact, or leave the step out of "
            "--steps, and descend with it"
        )
    if "descend" in recipe.steps and not any(target.grid.rounded for target in targets):
        raise UsageError(f"step descend: {unrounded} rounds its weights itself; leave the step out of --steps")
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


def _by_preset(recipe: Recipe, layers: tuple[DecoderLayer, ...]) -> frozenset[str]:
    """The linears that the preset quantizes."""
    if (recipe.preset or "quality") == "quality" and any(layer.experts for layer in layers):
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
