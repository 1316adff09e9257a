"""Formats of safetensors shards that engines load as a folder: how a quantized linear becomes tensors, and back.

A format of this kind is `pack`, its inverse, the reader that evaluations use, and its entry in config.json.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from dsquant.calibration.texts import TOKENIZER_FILES
from dsquant.errors import UsageError
from dsquant.files.foreign import find_file
from dsquant.formats.output_shards import StoredTensor, plan_shards
from dsquant.formats.protocol import Format
from dsquant.formats.safetensors_target import SafetensorsTarget, matrix
from dsquant.formats.wanted import NO_CHOICE, Linears, Wanted, Width
from dsquant.formats.whole_groups import in_groups
from dsquant.model.structure import first_experts, linear_groups
from dsquant.presets import Activations
from dsquant.recipes import Recipe
from dsquant.schemes import (
    FP8_WIDTH,
    KEPT_WIDTHS,
    UNQUANTIZED,
    Fp8Blocks,
    Grid,
    QuantizedWeight,
    Scheme,
    group_size_hint,
)
from dsquant.source.checkpoint import stored_parts
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU, Weights

# Never code: a checkpoint's own Python files stay where they are.
COPIED = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
# Keys of a config.json that hold for the source only.
DROPPED_KEYS = ("quantization_config", "auto_map")
# Of a linear in FP8 blocks, to a thousandth.
FP8_BITS = 8
S = TypeVar("S", bound=Scheme)


class SafetensorsFormat(Format, Generic[S]):
    """A way to store quantized linears in safetensors."""

    placement: Literal["parallel", "split", "unified"] = "parallel"
    bits: tuple[int, ...]
    """Bits of a code that it can hold, the default first."""
    group_sizes: tuple[int, ...]
    """Sizes of groups; where there is one, a recipe's is for other formats."""
    metadata = "pt"
    """The tensors' layout in its shards' headers."""
    config_keys: tuple[str, ...] = ("quantization_config",)
    """Keys of config.json that describe what is quantized."""
    rank = 1
    """Its place in `plan` among formats of one preset, which lose alike."""

    def widths(self, kept: Width = UNQUANTIZED) -> tuple[Width, ...]:
        """Bits of a code that it can hold, and the width of linears that stay as they are, if they are fewer than
        those."""
        most = FP8_BITS if kept == FP8_WIDTH else UNQUANTIZED
        return (*(bits for bits in sorted(self.bits) if bits < most), kept)

    def wrote(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a config.json's `quantization_config` is of this format."""
        return quantization.get("quant_method") == self.name

    @abstractmethod
    def described(self, quantization: Mapping[str, Any]) -> str:
        """Returns a short description of a `quantization_config` for reports."""

    @abstractmethod
    def decoded(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> Weights:
        """Opens the weights of a checkpoint in this format, under the original's names, from its tensors and its
        `quantization_config`; they are decoded on `device`. Raises InputError where the tensors contradict the
        config."""

    def library(self, widths: Collection[int], mixture: bool) -> str | None:
        """Returns the library that model cards name for an output with linears of these widths, if any."""
        return "transformers" if len(widths) < 2 else None

    @abstractmethod
    def scheme(self, wanted: Wanted, group_size: int, output: str) -> S:
        """Returns the scheme that linears are rounded to; `output` keeps it apart from other outputs', where it is not
        empty. Raises UsageError where the recipe asks for another."""

    @abstractmethod
    def check(self, grid: S, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises UsageError where the format or its engines cannot hold the grid, or linears (name -> [O, I]) on it."""

    def check_activations(self, recipe: Recipe, grid: S, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises UsageError where engines do not round the inputs of such linears as the recipe asks."""
        raise NotImplementedError

    def unrounded(self, kind: Activations | None, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Returns the quantized linears (name -> [O, I]) whose inputs stay as they are, since no kernel takes them."""
        return []

    def with_activations(
        self, quantization: dict[str, Any], kind: Activations, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Any]:
        """Returns a `quantization_config` that has engines round the inputs of quantized linears (name -> [O, I])."""
        raise NotImplementedError

    def rounds_inputs(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a `quantization_config` has engines round the inputs of packed linears."""
        return False

    def input_scale(self, linear: str, largest: float) -> dict[str, torch.Tensor]:
        """Packs the scale of a linear's inputs, whose largest magnitude is given, where engines round them under one:
        tensor name -> tensor, as `stored` announces it."""
        raise NotImplementedError

    @abstractmethod
    def stored(self, linear: str, shape: tuple[int, int], grid: S) -> list[StoredTensor]:
        """Returns the tensors that a quantized linear of shape [O, I] becomes."""

    def stored_fp8(self, linear: str, shape: tuple[int, int], blocks: Fp8Blocks) -> tuple[StoredTensor, StoredTensor]:
        """Returns the tensors that a linear of shape [O, I] in FP8 blocks becomes: its codes and scales."""
        raise NotImplementedError

    @abstractmethod
    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packs a quantized weight: tensor name -> tensor, as `stored` announces them, but for `input_scale`."""

    @abstractmethod
    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: S) -> QuantizedWeight:
        """Undoes `pack`."""

    @abstractmethod
    def quantization_config(self, grid: S, linears: Linears) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json as plain JSON values."""

    def stack_of(self, tensor: str) -> tuple[str, int] | None:
        """Returns the stack of tensors of one shape that stores a parameter, or one of `stored`, and its place there;
        None where it is stored by itself."""
        return None

    def engines_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys of config.json in which the format's engines read what transformers writes in others.

        Raises UsageError where the engines would compute another network.
        """
        return {}

    def quantizable(self, wanted: Wanted) -> frozenset[str]:
        """Returns those of the preset's linears that its engines take quantized."""
        return wanted.linears

    def released(self, wanted: Wanted) -> Mapping[str, Grid]:
        """Returns the linears that the output takes over from the source in its own integers -> their grid. Raises
        UsageError where engines do not take both."""
        return NO_CHOICE

    def serve_command(self, location: Path | str) -> str:
        """vLLM's; bfloat16, since float16 overflows in DeepSeek's deeper layers."""
        return f"vllm serve {location} --dtype bfloat16"

    def plan(self, wanted: Wanted) -> SafetensorsTarget:
        recipe, weights = wanted.recipe, wanted.checkpoint.weights
        released = self.released(wanted)
        fitting, group_size, notes = in_groups(wanted, self.quantizable(wanted), released, self.group_sizes)
        linears, notes = fitting, notes + _released_notes(released, fitting)
        fp8 = _in_blocks(wanted) if self.holds_fp8 else {}
        differs = wanted.chosen or linears != wanted.linears or _scales_blocks(wanted, linears, fp8)
        grid = self.scheme(wanted, group_size, wanted.name if differs and len(recipe.to) > 1 else "")
        chosen, layers = wanted.chosen, wanted.layers if wanted.chosen else ()
        groups = [group for layer in layers for group in linear_groups(layer, linears).items()]
        widths = {linear: chosen[name] for name, inside in groups for linear in inside}
        linears = linears.difference(linear for linear, width in widths.items() if width in KEPT_WIDTHS)
        fp8 = {linear: blocks for linear, blocks in fp8.items() if linear not in linears}
        shapes = {linear: matrix(weights.shape(f"{linear}.weight")) for linear in sorted(linears)}
        self.check(grid, shapes)
        if recipe.activations in self.activations:
            self.check_activations(recipe, grid, shapes)
            notes += _unrounded_notes(self.unrounded(recipe.activations, shapes))

        def stored(parameter: str) -> list[StoredTensor]:
            linear = parameter.removesuffix(".weight")
            if linear in linears:
                return self.stored(linear, shapes[linear], grid.with_bits(widths.get(linear, grid.bits)))
            if linear in released:
                return [*_as_stored(wanted.checkpoint.index, parameter)]
            if linear in fp8:
                return [*self.stored_fp8(linear, matrix(weights.shape(parameter)), fp8[linear])]
            return [StoredTensor(parameter, wanted.dtypes[parameter], weights.shape(parameter))]

        units = {unit: chain.from_iterable(map(stored, names)) for unit, names in wanted.parameters.items()}
        tensors, stacks = _stacked(self, units)
        bits = {linear: widths.get(linear, 0) for linear in shapes}
        return SafetensorsTarget(
            name=wanted.name,
            folder=wanted.folder,
            grid=grid,
            linears=linears,
            fitting=fitting,
            format=self,
            shards=plan_shards(tensors, recipe.max_shard_bytes, self.metadata),
            stacks=stacks,
            dtypes=wanted.dtypes,
            fp8=fp8,
            released=released,
            alike=first_experts(wanted.layers) if grid.noted else {},
            config=_config(wanted, self, grid, bits, {**fp8, **released}),
            copied=tuple(copied_files(wanted.checkpoint.folder)),
            chosen={linear: widths[linear] for linear in shapes if widths},
            notes=notes,
        )


def _in_blocks(wanted: Wanted) -> dict[str, Fp8Blocks]:
    """Returns the linears of the output that have FP8 blocks in the source."""
    made = {parameter for parameters in wanted.parameters.values() for parameter in parameters}
    return {linear: blocks for linear, blocks in wanted.fp8.items() if f"{linear}.weight" in made}


def _as_stored(index: ShardIndex, parameter: str) -> Iterator[StoredTensor]:
    """Yields the tensors that a parameter is made of in the source."""
    for part in (index[name] for name in stored_parts(index, parameter)):
        yield StoredTensor(part.name, part.dtype, part.shape)


def _released_notes(released: Mapping[str, Grid], linears: Collection[str]) -> tuple[str, ...]:
    """Returns what the user should know of linears that keep the source's integers."""
    if not released:
        return ()
    grid = next(iter(released.values()))
    note = f"{len(released)} linears keep the codes of the model: {grid.bits} bits in groups of {grid.group_size}"
    return (note if linears else f"{note}; nothing else is quantized, --preset compact takes what is left",)


def _unrounded_notes(unrounded: Collection[str]) -> tuple[str, ...]:
    """Returns what the user should know of linears whose inputs stay as they are."""
    kinds = ", ".join(sorted({linear.rpartition(".")[2] for linear in unrounded}))
    return (f"{len(unrounded)} linears keep inputs in BF16, as no kernel takes their shape: {kinds}",) if kinds else ()


def _scales_blocks(wanted: Wanted, linears: frozenset[str], fp8: Collection[str]) -> bool:
    """Returns whether scales of quantized linears of attention are folded into one in FP8 blocks."""
    groups = (group for layer in wanted.layers for group in layer.attention)
    return any(group.consumers[0] in linears and group.producer in fp8 for group in groups)


def check_columns(linear: str, shape: tuple[int, int], grid: Grid) -> None:
    """Raises UsageError where a linear's columns are not whole groups."""
    if shape[1] % grid.group_size:
        raise UsageError(
            f"{linear}: shape {list(shape)}: the columns must be a multiple of --group-size {grid.group_size}; "
            f"{group_size_hint(shape[1])}"
        )


def copied_files(folder: Path) -> list[str]:
    """Lists the checkpoint's files that its quantized version needs as they are; raises InputError where one is not a
    regular file, or a link that leads out of the checkpoint."""
    return [name for name in COPIED if find_file(folder, name) is not None]


def _stacked(
    known: SafetensorsFormat[Any], units: Mapping[str, Iterable[StoredTensor]]
) -> tuple[list[tuple[str, list[StoredTensor]]], dict[str, tuple[str, ...]]]:
    """Returns the units' tensors with stacks in place of their parts, and stack -> its parts in order."""
    stacks: dict[str, tuple[str, ...]] = {}
    tensors = []
    for unit, parts in units.items():
        stacked, found = _stacked_unit(known, parts)
        tensors.append((unit, stacked))
        stacks |= found
    return tensors, stacks


def _stacked_unit(
    known: SafetensorsFormat[Any], parts: Iterable[StoredTensor]
) -> tuple[list[StoredTensor], dict[str, tuple[str, ...]]]:
    places: dict[str, dict[int, StoredTensor]] = {}
    stored: dict[str, StoredTensor] = {}
    for part in parts:
        stack, place = known.stack_of(part.name) or (part.name, None)
        if place is not None:
            places.setdefault(stack, {})[place] = part
            part = StoredTensor(stack, part.dtype, (len(places[stack]), *part.shape))
        stored[stack] = part
    for stack, held in places.items():
        assert sorted(held) == list(range(len(held))), f"{stack}: parts {sorted(held)}"
        assert len({(part.dtype, part.shape) for part in held.values()}) == 1, f"{stack}: parts of several shapes"
    return list(stored.values()), {
        stack: tuple(held[place].name for place in range(len(held))) for stack, held in places.items()
    }


def _config(
    wanted: Wanted,
    output_format: SafetensorsFormat[Any],
    grid: Scheme,
    linears: Mapping[str, int],
    kept: Mapping[str, Fp8Blocks | Grid],
) -> dict[str, Any]:
    """Returns the source's config.json with the output's quantization_config in place of the FP8 one; `linears` is
    every quantized linear -> bits, 0 where no width was chosen."""
    config = {key: value for key, value in wanted.checkpoint.config.items() if key not in DROPPED_KEYS}
    config |= {key: value for key, value in wanted.skeleton.family.stated.items() if config.get(key) is None}
    layers = wanted.skeleton.layers
    if wanted.recipe.mtp == "drop" and wanted.skeleton.num_mtp_layers:
        config[wanted.skeleton.family.mtp_key] = 0
        layers = layers[: wanted.skeleton.num_layers]
    quantized = {linear: linear in linears for layer in layers for linear in layer.linears}
    followers = {name for layer in layers for group in layer.scale_groups for name in group.followers}
    quantized |= {name.removesuffix(".weight"): False for name in sorted(followers - {one.router for one in layers})}
    drafts = [layer.prefix for layer in layers[wanted.skeleton.num_layers :]]
    widths = {linear: bits for linear, bits in linears.items() if bits}
    draft = drafts[0] if drafts else ""
    words = output_format.quantization_config(grid, Linears(quantized, widths, draft, kept))
    if wanted.recipe.activations in output_format.activations:
        weights = wanted.checkpoint.weights
        shapes = {linear: matrix(weights.shape(f"{linear}.weight")) for linear in linears}
        words = output_format.with_activations(words, wanted.recipe.activations, shapes)
    return config | output_format.engines_config(config) | dict.fromkeys(output_format.config_keys, words)
