"""One checkpoint of safetensors shards, planned from headers to the byte."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dsquant.errors import UsageError
from dsquant.formats.output_shards import ShardPlan, StoredTensor
from dsquant.formats.protocol import Contents, StoredFile, Surroundings, Target
from dsquant.formats.safetensors_writer import OpenCheckpoint
from dsquant.formats.scales import SCALES_FILE
from dsquant.formats.wanted import Choice, Choosable, Wanted, Width
from dsquant.model.structure import linear_groups
from dsquant.schemes import FP8_WIDTH, KEPT_WIDTHS, UNQUANTIZED, Fp8Blocks, Grid
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint, stored_parts
from dsquant.source.license import CARD_FILE
from dsquant.source.shards import INDEX_FILE, read_index, tensor_bytes
from dsquant.source.weights import Weights

if TYPE_CHECKING:
    from dsquant.formats.safetensors import SafetensorsFormat

# All kernels of vLLM and SGLang take these; other widths are chosen only where a target cannot be met without them.
STOCK_WIDTHS = (4, 8, *KEPT_WIDTHS)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns a linear's [O, I]."""
    return shape[0], shape[1]


@dataclass(frozen=True)
class SafetensorsTarget(Target):
    """A checkpoint to write."""

    format: "SafetensorsFormat[Any]"
    fitting: frozenset[str]
    """The linears whose columns are whole groups: quantized, unless a choice leaves them as they are."""
    shards: ShardPlan
    dtypes: Mapping[str, str]
    """Parameter -> safetensors dtype in which it is stored where it is not quantized."""
    config: Mapping[str, Any]
    copied: tuple[str, ...]
    """The source's files that the output gets as they are."""
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Stored tensor -> the tensors that it concatenates."""
    fp8: Mapping[str, Fp8Blocks] = field(default_factory=dict)
    """Linear that stays in the source's FP8 blocks -> these."""
    released: Mapping[str, Grid] = field(default_factory=dict)
    """Linear that keeps the integers of the source -> their grid."""
    alike: Mapping[str, str] = field(default_factory=dict)
    """Linear -> the one whose name stands for all that have one scale of their inputs; itself where it is left out."""
    chosen: Mapping[str, int] = field(default_factory=dict)
    """Quantized linear -> bits, where widths were chosen."""

    @cached_property
    def place_of(self) -> Mapping[str, tuple[str, int]]:
        """Tensor -> the stack that it lies in, and where."""
        return {part: (stack, place) for stack, parts in self.stacks.items() for place, part in enumerate(parts)}

    @property
    def num_bytes(self) -> int:
        return self.shards.num_bytes

    @property
    def location(self) -> PurePosixPath:
        return self.folder

    @property
    def widths(self) -> Mapping[str, int]:
        return self.chosen

    @property
    def in_blocks(self) -> frozenset[str]:
        return frozenset(self.fp8)

    @property
    def packed(self) -> frozenset[str]:
        return frozenset(self.released)

    def fp8_tensors(self, parameter: str, checkpoint: Checkpoint) -> tuple[StoredTensor, StoredTensor] | None:
        """Returns the tensors of codes and scales of a parameter in FP8 blocks; None for any other."""
        linear = parameter.removesuffix(".weight")
        if linear not in self.fp8:
            return None
        return self.format.stored_fp8(linear, matrix(checkpoint.weights.shape(parameter)), self.fp8[linear])

    def file_names(self) -> list[str]:
        names = [shard.file_name for shard in self.shards.shards]
        return [*names, *self.copied, CONFIG_FILE, INDEX_FILE, CARD_FILE, SCALES_FILE]

    def open(self, surroundings: Surroundings, resumed: bool) -> OpenCheckpoint:
        """Opens nothing yet: each unit has its own shards."""
        return OpenCheckpoint(self, surroundings)

    def finished_files(self, output: Path, units: Sequence[str], tensors: Collection[str]) -> Iterable[StoredFile]:
        for shard in (shard for unit in units for shard in self.shards.shards_of(unit)):
            places, offset = {}, len(shard.header)
            for tensor in shard.tensors:
                places[tensor.name] = (offset, tensor.num_bytes)
                offset += tensor.num_bytes
            yield StoredFile(output / self.folder / shard.file_name, shard.header, shard.num_bytes, places)

    def candidate(self, output: Path, checkpoint: Checkpoint) -> Weights:
        index = read_index(output / self.folder)
        return self.format.decoded(index, self.config["quantization_config"], checkpoint.weights.device)

    def contents(self, hashes: Mapping[str, str], output: Path) -> Contents:
        return {
            str(self.folder / shard.file_name): {
                "tensors": {
                    tensor.name: [tensor.dtype, hashes[tensor.name], *tensor.shape] for tensor in shard.tensors
                },
                **({} if shard.metadata == "pt" else {"metadata": shard.metadata}),
            }
            for shard in self.shards.shards
        }

    def recorded(self, errors: Mapping[str, float]) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            "grid": dict(self.grid.facts),
            "weight_errors": dict(errors),
        }

    def choice(self, wanted: Wanted) -> Choice:
        """Offers a width for each group of linears that engines fuse or that share their scales."""
        if wanted.recipe.mtp == "quantize":
            raise UsageError(
                f"{wanted.recipe.target}: no width is chosen for a multi-token-prediction layer; take --mtp keep or "
                "drop"
            )
        quantizable = self.fitting
        shapes = {linear: matrix(wanted.checkpoint.weights.shape(f"{linear}.weight")) for linear in quantizable}

        fp8 = wanted.fp8 if self.format.holds_fp8 else {}
        known = self.format.widths(FP8_WIDTH if quantizable <= fp8.keys() else UNQUANTIZED)

        def plain_size(parameter: str) -> int:
            linear, shape = parameter.removesuffix(".weight"), wanted.checkpoint.weights.shape(parameter)
            if linear in self.released:
                index = wanted.checkpoint.index
                return sum(index[part].num_bytes for part in stored_parts(index, parameter))
            if linear not in fp8:
                return tensor_bytes(wanted.dtypes[parameter], shape)
            return sum(tensor.num_bytes for tensor in self.format.stored_fp8(linear, matrix(shape), fp8[linear]))

        def size(linear: str, width: Width) -> int:
            if width in KEPT_WIDTHS:
                return plain_size(f"{linear}.weight")
            stored = self.format.stored(linear, shapes[linear], self.grid.with_bits(int(width)))
            return sum(tensor.num_bytes for tensor in stored)

        groups = tuple(
            Choosable(name, layer.index, inside, {width: sum(size(one, width) for one in inside) for width in known})
            for layer in wanted.layers
            for name, inside in linear_groups(layer, quantizable).items()
        )
        parameters = [name for names in wanted.parameters.values() for name in names]
        rest = [name for name in parameters if name.removesuffix(".weight") not in quantizable]
        others = sum(map(plain_size, rest))
        widths = ", ".join(str(width) for width in known if width not in KEPT_WIDTHS)
        kept = FP8_WIDTH if FP8_WIDTH in known else "BF16"
        return Choice(
            groups,
            elements=sum(math.prod(shape) for shape in shapes.values()),
            other_bytes=others,
            fixed_bytes=0,
            words=f"{self.format.name} with {widths} bits or {kept} for what preset {wanted.recipe.preset} quantizes",
            widths=known,
            preferred=STOCK_WIDTHS,
        )


def only_checkpoint(targets: Sequence[Target]) -> SafetensorsTarget:
    """Returns the only output of a plan, a checkpoint."""
    (target,) = targets
    assert isinstance(target, SafetensorsTarget), target.name
    return target
