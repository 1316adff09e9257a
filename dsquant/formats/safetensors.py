"""A checkpoint of safetensors shards that engines load as a folder: planned, written and finished.

What a format decides is how a quantized linear becomes tensors: `pack`, its inverse, and the config's words for it.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dsquant.calibration.texts import TOKENIZER_FILES
from dsquant.errors import UsageError
from dsquant.files.disk import PARTIAL, copy_file, naming, write_atomically
from dsquant.files.foreign import find_file
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.protocol import (
    NO_CHOICE,
    Choice,
    Choosable,
    Format,
    OpenTarget,
    StoredFile,
    Surroundings,
    Target,
    Tensors,
    UnitWriter,
    Wanted,
)
from dsquant.formats.scales import SCALES_FILE
from dsquant.formats.shards import ShardFile, ShardPlan, StoredTensor, plan_shards, write_index
from dsquant.model.structure import linear_groups
from dsquant.schemes import UNQUANTIZED, Grid, QuantizedWeight
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint
from dsquant.source.shards import DTYPES, INDEX_FILE, tensor_bytes
from dsquant.source.weights import Weights

CARD_FILE = "README.md"
# Never code: a checkpoint's own Python files stay where they are.
COPIED = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
# What is the source's in a config.json, and not the output's.
DROPPED_KEYS = ("quantization_config", "auto_map")
# Tables are copied in parts of this many rows: a multiple of the FP8 block, 112 MiB for R1's embedding.
ROWS_AT_ONCE = 4096
# What vLLM's and SGLang's kernels take; other widths are chosen only where a target cannot be met without them.
STOCK_WIDTHS = (4, 8, UNQUANTIZED)


class SafetensorsFormat(Format):
    """A way to store quantized linears in safetensors."""

    widths: tuple[int, ...]
    """The bits of a code that it can hold, and 16 for linears that stay as they are."""

    @abstractmethod
    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses what the format or the engines that read it cannot hold.

        Args:
            grid: the quantization grid.
            shapes: linear -> [O, I] of everything to be quantized.

        Raises:
            UsageError: naming the linear, where it is about one.
        """

    @abstractmethod
    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        """The tensors that a quantized linear becomes.

        Args:
            linear: its module name.
            shape: [O, I].
            grid: the quantization grid.

        Returns:
            Names, dtypes and shapes.
        """

    @abstractmethod
    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packs a quantized weight into those tensors.

        Args:
            linear: its module name.
            weight: the weight.

        Returns:
            Tensor name -> tensor, as `stored` announced.
        """

    @abstractmethod
    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Undoes `pack`.

        Args:
            linear: its module name.
            tensors: tensor name -> tensor, as `stored` announced.
            grid: the quantization grid.

        Returns:
            The weight.
        """

    @abstractmethod
    def quantization_config(
        self, grid: Grid, linears: Mapping[str, bool], widths: Mapping[str, int] = NO_CHOICE
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            grid: the quantization grid.
            linears: every linear of the decoder -> whether it is quantized.
            widths: linear -> bits, where widths were chosen; else all have the grid's.

        Returns:
            Plain JSON values.
        """

    def default_symmetric(self, mixture: bool) -> bool | None:
        """Whether its engines want no zero points.

        Args:
            mixture: whether the model has routed experts.

        Returns:
            True, false, or None where there is no choice.
        """
        return False

    def plan(self, wanted: Wanted) -> "SafetensorsTarget":
        """Plans every shard.

        Args:
            wanted: the recipe and the source.

        Returns:
            The plan.

        Raises:
            UsageError: where the format cannot hold what the recipe asks for.
        """
        recipe, weights = wanted.recipe, wanted.checkpoint.weights
        symmetric = recipe.symmetric
        if symmetric is None:
            symmetric = bool(self.default_symmetric(wanted.mixture))
        grid = Grid(recipe.bits, recipe.group_size, symmetric)
        groups = _groups(wanted) if wanted.chosen else {}
        widths = {linear: int(wanted.chosen[name]) for name, linears in groups.items() for linear in linears}
        linears = wanted.linears.difference(linear for linear, width in widths.items() if width == UNQUANTIZED)
        shapes = {linear: _matrix(weights.shape(f"{linear}.weight")) for linear in sorted(linears)}
        self.check(grid, shapes)

        def stored(parameter: str) -> list[StoredTensor]:
            linear = parameter.removesuffix(".weight")
            if linear in linears:
                return self.stored(linear, shapes[linear], grid.with_bits(widths.get(linear, grid.bits)))
            return [StoredTensor(parameter, wanted.dtypes[parameter], weights.shape(parameter))]

        tensors = [
            (unit, [tensor for parameter in parameters for tensor in stored(parameter)])
            for unit, parameters in wanted.parameters.items()
        ]
        return SafetensorsTarget(
            name=wanted.name,
            folder=wanted.folder,
            grid=grid,
            linears=linears,
            format=self,
            shards=plan_shards(tensors, recipe.max_shard_bytes),
            dtypes=wanted.dtypes,
            config=_config(wanted, self, grid, linears, {linear: widths[linear] for linear in shapes if widths}),
            copied=tuple(copied_files(wanted.checkpoint.folder)),
            chosen={linear: widths[linear] for linear in shapes if widths},
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def copied_files(folder: Path) -> list[str]:
    """The files of a checkpoint that its quantized version needs as they are.

    Args:
        folder: the checkpoint.

    Returns:
        Their names.

    Raises:
        InputError: where one is not a regular file, or a link that leads out of the checkpoint.
    """
    return [name for name in COPIED if find_file(folder, name) is not None]


def _groups(wanted: Wanted) -> dict[str, tuple[str, ...]]:
    """The groups of linears that get one width, of all layers."""
    return {name: linears for layer in wanted.layers for name, linears in linear_groups(layer, wanted.linears).items()}


def _config(
    wanted: Wanted, output_format: SafetensorsFormat, grid: Grid, linears: frozenset[str], widths: Mapping[str, int]
) -> dict[str, Any]:
    """The source's config.json with the output's quantization_config in place of the FP8 one."""
    config = {key: value for key, value in wanted.checkpoint.config.items() if key not in DROPPED_KEYS}
    layers = wanted.skeleton.layers
    if wanted.recipe.mtp == "drop" and wanted.skeleton.num_mtp_layers:
        config[wanted.skeleton.family.mtp_key] = 0
        layers = layers[: wanted.skeleton.num_layers]
    quantized = {linear: linear in linears for layer in layers for linear in layer.linears}
    config["quantization_config"] = output_format.quantization_config(grid, quantized, widths)
    return config


@dataclass(frozen=True)
class SafetensorsTarget(Target):
    """One checkpoint to write."""

    format: SafetensorsFormat
    shards: ShardPlan
    dtypes: Mapping[str, str]
    """Parameter -> safetensors dtype in which it is stored where it is not quantized."""
    config: Mapping[str, Any]
    """The content of config.json."""
    copied: tuple[str, ...]
    """The source's files that the output gets as they are."""
    chosen: Mapping[str, int] = field(default_factory=dict)
    """Quantized linear -> bits, where widths were chosen."""

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return self.shards.num_bytes

    @property
    def location(self) -> PurePosixPath:
        """The folder."""
        return self.folder

    @property
    def widths(self) -> Mapping[str, int]:
        """Quantized linear -> bits, where widths were chosen; else all have the grid's."""
        return self.chosen

    def file_names(self) -> list[str]:
        """Shards, index, config, card, scales, and what is copied."""
        names = [shard.file_name for shard in self.shards.shards]
        return [*names, *self.copied, CONFIG_FILE, INDEX_FILE, CARD_FILE, SCALES_FILE]

    def open(self, surroundings: Surroundings, resumed: bool) -> "OpenCheckpoint":
        """Opens nothing yet: each unit has its own shards.

        Args:
            surroundings: of the job.
            resumed: whether finished units are there already.

        Returns:
            The output.
        """
        return OpenCheckpoint(self, surroundings)

    def finished_files(self, output: Path, units: Sequence[str], tensors: Collection[str]) -> Iterable[StoredFile]:
        """The shards of finished units.

        Args:
            output: the job's output folder.
            units: the finished ones.
            tensors: theirs.

        Yields:
            Each shard.
        """
        for shard in (shard for unit in units for shard in self.shards.shards_of(unit)):
            places, offset = {}, len(shard.header)
            for tensor in shard.tensors:
                places[tensor.name] = (offset, tensor.num_bytes)
                offset += tensor.num_bytes
            yield StoredFile(output / self.folder / shard.file_name, shard.header, shard.num_bytes, places)

    def candidate(self, output: Path, checkpoint: Checkpoint) -> Weights:
        """The finished checkpoint's weights, on the original's device.

        Args:
            output: the job's output folder.
            checkpoint: the original.

        Returns:
            The weights.
        """
        return open_checkpoint(output / self.folder, checkpoint.weights.device).weights

    def tensors(self, hashes: Mapping[str, str], output: Path) -> Tensors:
        """What lies in the shards.

        Args:
            hashes: tensor -> SHA-256.
            output: the job's output folder.

        Returns:
            Their entries for the record.
        """
        return {
            str(self.folder / shard.file_name): {
                tensor.name: [tensor.dtype, hashes[tensor.name], *tensor.shape] for tensor in shard.tensors
            }
            for shard in self.shards.shards
        }

    def recorded(self, errors: Mapping[str, float]) -> dict[str, Any]:
        """What the record tells of it.

        Args:
            errors: linear -> the relative error of its weight.

        Returns:
            Plain JSON values.
        """
        return {
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            "grid": vars(self.grid),
            "weight_errors": dict(errors),
        }

    def choice(self, wanted: Wanted) -> Choice:
        """A width for each group of linears that engines fuse or that share their scales.

        Args:
            wanted: what was planned.

        Returns:
            The groups and their sizes.

        Raises:
            UsageError: where multi-token-prediction layers are to be quantized, whose sensitivity is not measured.
        """
        if wanted.recipe.mtp == "quantize":
            raise UsageError(
                f"{wanted.recipe.target}: no width is chosen for a multi-token-prediction layer; take --mtp keep or "
                "drop"
            )
        shapes = {linear: _matrix(wanted.checkpoint.weights.shape(f"{linear}.weight")) for linear in wanted.linears}

        def size(linear: str, width: int) -> int:
            if width == UNQUANTIZED:
                return tensor_bytes(wanted.dtypes[f"{linear}.weight"], shapes[linear])
            stored = self.format.stored(linear, shapes[linear], self.grid.with_bits(width))
            return sum(tensor.num_bytes for tensor in stored)

        groups = tuple(
            Choosable(name, layer.index, inside, {w: sum(size(one, w) for one in inside) for w in self.format.widths})
            for layer in wanted.layers
            for name, inside in linear_groups(layer, wanted.linears).items()
        )
        parameters = [name for names in wanted.parameters.values() for name in names]
        rest = [name for name in parameters if name.removesuffix(".weight") not in wanted.linears]
        others = sum(tensor_bytes(wanted.dtypes[name], wanted.checkpoint.weights.shape(name)) for name in rest)
        widths = ", ".join(f"{width} bits" for width in self.format.widths if width != UNQUANTIZED)
        return Choice(
            groups,
            elements=sum(math.prod(shape) for shape in shapes.values()),
            other_bytes=others,
            fixed_bytes=0,
            words=f"{self.format.name} with {widths} or BF16 for what preset {wanted.recipe.preset} quantizes",
            widths=self.format.widths,
            preferred=STOCK_WIDTHS,
        )


def only_checkpoint(targets: Sequence[Target]) -> SafetensorsTarget:
    """The only output of a plan, a checkpoint."""
    (target,) = targets
    assert isinstance(target, SafetensorsTarget), target.name
    return target


class OpenCheckpoint(OpenTarget):
    """A checkpoint that is being written."""

    def __init__(self, target: SafetensorsTarget, surroundings: Surroundings) -> None:
        self.target = target
        self._surroundings = surroundings
        self._folder = surroundings.output / target.folder

    def unit(self, name: str, parameters: tuple[str, ...]) -> "ShardWriter":
        """Begins a unit's shards.

        Args:
            name: of the unit.
            parameters: its parameters.

        Returns:
            Their writer.
        """
        self._folder.mkdir(exist_ok=True)
        return ShardWriter(self.target, self._surroundings, name, parameters)

    def finish(self, kept: Iterable[Mapping[str, torch.Tensor]], calibration: Mapping[str, Any] | None) -> None:
        """Writes what makes the shards a checkpoint.

        Args:
            kept: nothing.
            calibration: not needed.
        """
        for name in self.target.copied:
            partial_file = self._folder / (name + PARTIAL)
            with naming(self._folder / name):
                copy_file(self._surroundings.checkpoint.folder / name, partial_file)
            partial_file.replace(self._folder / name)
        content = json.dumps(self.target.config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._folder / CONFIG_FILE, content.encode())
        write_index(self._folder, self.target.shards)


class ShardWriter(UnitWriter):
    """Writes one unit's tensors into its shards."""

    def __init__(
        self, target: SafetensorsTarget, surroundings: Surroundings, unit: str, parameters: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._target, self._surroundings, self._parameters = target, surroundings, parameters
        begins, folder = surroundings.ranks.first, surroundings.output / target.folder
        self._shards = [ShardFile(folder, shard, begins) for shard in target.shards.shards_of(unit)]
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.plan.tensors}
        self._written: set[str] = set()

    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        """Writes a linear's quantized weight, or a parameter's values in its planned dtype."""
        if isinstance(value, QuantizedWeight):
            for stored_name, tensor in self._target.format.pack(name, value).items():
                self._write_rows(stored_name, 0, tensor)
            self._written.add(f"{name}.weight")
            return
        self._write_rows(name, 0, value.to(DTYPES[self._target.dtypes[name]]))
        self._written.add(name)

    def _write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        shard, behind = self._shard_of[name], self._surroundings.write_behind
        if behind is not None:  # all of a shard in one thread
            behind.write(rows, partial(shard.write_rows, name, start))
        else:
            shard.write_rows(name, start, rows)
        self.bytes_written += rows.nbytes

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Copies the unit's parameters that nothing has changed, in parts of bounded size."""
        weights, ranks = self._surroundings.checkpoint.weights, self._surroundings.ranks
        written = set[str]().union(*ranks.gather(self._written))
        rest = [name for name in self._parameters if name not in written]
        for name in rest[ranks.rank :: ranks.size]:
            safe_point(name)
            dtype, num_rows = DTYPES[self._target.dtypes[name]], weights.shape(name)[0]
            for start in range(0, num_rows, ROWS_AT_ONCE):
                rows = weights.rows(name, start, min(start + ROWS_AT_ONCE, num_rows))
                self._write_rows(name, start, rows.to(dtype))

    def commit(self) -> dict[str, str]:
        """Brings every shard to disk under its final name; returns tensor name -> SHA-256."""
        if self._surroundings.write_behind is not None:
            self._surroundings.write_behind.wait()
        own = [shard.sync() for shard in self._shards]
        found = [hashes for part in self._surroundings.ranks.gather(own) for hashes in part]
        hashes = {name: digest for hashes in found for name, digest in hashes.items()}
        for shard in self._shards:
            shard.publish(hashes)
        return {tensor.name: hashes[tensor.name] for shard in self._shards for tensor in shard.plan.tensors}

    def discard(self) -> None:
        """Removes what was written."""
        if self._surroundings.write_behind is not None:
            self._surroundings.write_behind.drop()
        for shard in self._shards:
            shard.discard()
