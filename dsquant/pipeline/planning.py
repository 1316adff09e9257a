"""Plans a run from headers alone: units of work, exact output tensors, its needs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from dsquant.errors import UsageError
from dsquant.formats.protocol import Target
from dsquant.formats.table import format_of
from dsquant.formats.wanted import NO_CHOICE, Wanted
from dsquant.model.complete import COMPUTED_SUFFIX
from dsquant.model.fp8_layouts import WHOLE
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import EMBEDDING
from dsquant.model.structure import DecoderLayer, absorbed_linears, layer_number
from dsquant.pipeline.memory import Needs, Workload, run_needs
from dsquant.precision.groups import MixedPlan, plan_mixed
from dsquant.recipes import Recipe
from dsquant.schemes import Fp8Blocks, Scheme
from dsquant.source.checkpoint import FP8, Checkpoint, StoredWeights

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
    linears: Mapping[Scheme, frozenset[str]]
    """Grid -> the linears that are quantized onto it, or scaled for it."""
    needs: Needs
    mixed: Mapping[str, MixedPlan] = field(default_factory=dict)
    """Folder of an output -> what a target for size or bits leaves to choose for it."""

    @property
    def disk_bytes(self) -> int:
        """Disk for the output and, while the run lasts, for hidden states."""
        most = {folder: mixed.total_bytes for folder, mixed in self.mixed.items()}
        return self.needs.work_bytes + sum(max(one.num_bytes, most.get(str(one.folder), 0)) for one in self.targets)

    @property
    def schemes(self) -> Mapping[Scheme, Mapping[str, Scheme]]:
        """Grid -> quantized linear -> its scheme, where that is another: then each output has a grid of its own."""
        return {target.grid: target.schemes for target in self.targets}

    @property
    def quantizes(self) -> bool:
        """Whether any linear is quantized or scaled; else layers are only observed."""
        return any(self.linears.values())

    @property
    def in_blocks(self) -> Mapping[Scheme, frozenset[str]]:
        """Grid -> linears that stay in FP8 blocks in an output on it."""
        return _by_grid(self.targets, lambda target: target.in_blocks)

    @property
    def packed(self) -> Mapping[Scheme, frozenset[str]]:
        """Grid -> linears that keep the source's integers in an output on it."""
        return _by_grid(self.targets, lambda target: target.packed)

    def linears_of(self, layer: DecoderLayer) -> dict[Scheme, frozenset[str]]:
        """Grid -> a layer's linears that are quantized onto it."""
        return {grid: linears.intersection(layer.linears) for grid, linears in self.linears.items()}


def plan_run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    gpu_budget_bytes: int = 0,
    num_ranks: int = 1,
    chosen: Mapping[str, Mapping[str, Any]] = NO_CHOICE,
) -> Plan:
    """Plans a run on a checkpoint that is complete (`check_complete`).

    `gpu_budget_bytes` is the most GPU memory: hidden states stay there where it suffices; memory is planned for one of
    `num_ranks` processes. `chosen` is folder of an output -> group of linears, or tensor -> its chosen width; empty
    before the choice. Raises InputError where a format has no place for a tensor, UsageError where it cannot store what
    the recipe asks for.
    """
    _check_choosing(recipe)
    units = plan_units(recipe.mtp, checkpoint, skeleton)
    wanted = _wanted(recipe, checkpoint, skeleton, units, chosen)
    targets = tuple(format_of(one.name).plan(one) for one in wanted)
    by_grid = _by_grid(targets, lambda target: target.linears)
    _check_left(recipe, targets)
    _check_mtp(recipe, skeleton)
    _check_steps(recipe, targets, skeleton)
    mixed = {}
    if recipe.target is not None:
        choices = [(str(one.folder), target.choice(one)) for one, target in zip(wanted, targets, strict=True)]
        mixed = {folder: plan_mixed(recipe, choice) for folder, choice in choices}
    # widths of their own part outputs on one grid
    num_grids = len(by_grid) if recipe.target is None else len(targets)
    storing = max(target.storing_bytes for target in targets)
    rounded = frozenset[str]().union(*(target.rounded for target in targets))
    work = Workload(recipe, checkpoint, skeleton, by_grid, storing, rounded, num_grids, num_ranks, gpu_budget_bytes)
    return Plan(units, targets, by_grid, run_needs(work), mixed)


def _by_grid(targets: Iterable[Target], linears_of: Callable[[Target], frozenset[str]]) -> dict[Scheme, frozenset[str]]:
    """Returns grid -> linears of all targets on it."""
    found: dict[Scheme, frozenset[str]] = {}
    for target in targets:
        found[target.grid] = found.get(target.grid, frozenset()) | linears_of(target)
    return found


def _wanted(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    units: tuple[Unit, ...],
    chosen: Mapping[str, Mapping[str, Any]],
) -> list[Wanted]:
    """Returns what each format is asked to plan."""
    dtypes = {name: _plain_dtype(checkpoint, name) for name in checkpoint.weights}
    fp8 = fp8_linears(checkpoint, skeleton) if recipe.rest == "fp8" else {}
    layers = _touched(recipe, skeleton)
    folders = _folders(recipe.to)
    return [
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
            fp8=fp8,
            chosen=chosen.get(str(folders[name]), NO_CHOICE),
        )
        for name in recipe.to
    ]


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


def _check_choosing(recipe: Recipe) -> None:
    """Refuses what widths are not chosen for."""
    if recipe.target is None:
        return
    option = "--target-bits" if recipe.target_bits is not None else "--target-size"
    kinds = [name.partition(":")[0] for name in recipe.to]
    if len(set(kinds)) < len(kinds):
        raise UsageError(f"{option} chooses the types of one GGUF output; found --to {', '.join(recipe.to)}")


def _check_left(recipe: Recipe, targets: tuple[Target, ...]) -> None:
    """Refuses to quantize a model that has all that its preset quantizes in few bits already."""
    if any(target.packed for target in targets) and not any(target.linears for target in targets):
        raise UsageError(
            f"--preset {recipe.preset}: the model has all linears of that preset in {recipe.bits} bits or fewer; take "
            "--preset compact, which quantizes the others, or fewer --bits"
        )


def _check_mtp(recipe: Recipe, skeleton: Skeleton) -> None:
    """Refuses to leave multi-token-prediction layers out of one of several outputs."""
    leaving = next((name for name in recipe.to if not format_of(name).keeps_mtp), None)
    if leaving and recipe.mtp != "drop" and skeleton.num_mtp_layers:
        raise UsageError(
            f"--to {leaving}: its engines take no multi-token-prediction layer; add --mtp drop, or make it in its own "
            "run"
        )


def _check_steps(recipe: Recipe, targets: tuple[Target, ...], skeleton: Skeleton) -> None:
    """Refuses steps that do nothing here."""
    if "gate-weights" in recipe.steps and not any(layer.experts for layer in skeleton.layers):
        raise UsageError("step gate-weights: this model has no routed experts; leave the step out of --steps")
    if "descend" in recipe.steps and not any(target.rounded for target in targets):
        unrounded = targets[0].name
        raise UsageError(f"step descend: {unrounded} rounds its weights itself; leave the step out of --steps")


def _touched(recipe: Recipe, skeleton: Skeleton) -> tuple[DecoderLayer, ...]:
    return skeleton.layers if recipe.mtp == "quantize" else skeleton.layers[: skeleton.num_layers]


def _by_preset(recipe: Recipe, layers: tuple[DecoderLayer, ...]) -> frozenset[str]:
    """The linears that the preset quantizes."""
    if (recipe.preset or "quality") == "quality" and any(layer.experts for layer in layers):
        return frozenset(linear for layer in layers for mlp in layer.experts for linear in mlp.linears)
    linears = frozenset(linear for layer in layers for linear in layer.linears)
    return linears if recipe.kv_b == "quantize" else linears - absorbed_linears(layers)


def plan_units(mtp: str, checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[Unit, ...]:
    """Divides a model into units: embedding, decoder layers, head, MTP layers (`mtp`: keep, quantize or drop), in this
    order."""
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
    stored = checkpoint.index.get(name)
    return "BF16" if stored is None or stored.dtype == FP8 else stored.dtype


def fp8_linears(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, Fp8Blocks]:
    """Returns the linears of decoder layers that a checkpoint has in FP8 blocks, with these."""
    block = checkpoint.weights.block if isinstance(checkpoint.weights, StoredWeights) else None
    if block is None or WHOLE in block:
        return {}
    index, linears = checkpoint.index, (linear for layer in skeleton.layers for linear in layer.linears)
    stored = ((linear, index.get(f"{linear}.weight")) for linear in linears)
    return {linear: Fp8Blocks(*block) for linear, info in stored if info is not None and info.dtype == FP8}
