"""Reads checkpoints of compressed-tensors: packed integers in groups, and FP8 in blocks."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.formats.beside_fp8 import COMPRESSED_TENSORS, FLOAT, BesideFp8, scheme_of
from dsquant.formats.decoded import checked_matrix, whole_number
from dsquant.packages import load
from dsquant.schemes import Grid
from dsquant.source.checkpoint import CONFIG_FILE
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

PACKED = "pack-quantized"


def _weights_group(config: Path, group: Any) -> dict[str, Any]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{config}: the config group has no object 'weights', found {group!r:.80}")
    if group.get("format") != FLOAT:
        whole_number(config, weights, "num_bits", 4, tuple(range(2, 9)))
        kind = weights.get("type", "int"), weights.get("symmetric", True)
        if kind[0] != "int" or not isinstance(kind[1], bool):
            raise InputError(
                f"{config}: a config group's weights are of type 'int', symmetric true or false; found {kind!r:.80}"
            )
    named_modules(config, "targets", group.get("targets"))
    return group


def named_modules(config: Path, key: str, found: Any) -> list[str]:
    """Returns a list of modules, of names and expressions, of config.json; raises InputError where it is none."""
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{config}: {key} must be a list of names, found {found!r:.80}")
    for name in (name for name in found if name.startswith("re:")):
        try:
            re.compile(name[3:])
        except re.error as error:
            raise InputError(f"{config}: {key} has {name!r:.80}, which is no regular expression: {error}") from error
    return found


def is_target(name: str, target: str) -> bool:
    """Returns whether an entry of `targets` or `ignore` means a module: its name, or an expression that begins it."""
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


class CompressedTensorsWeights(BesideFp8):
    """compressed-tensors' pack-quantized layout, decoded by compressed-tensors."""

    marker = "weight_packed"
    decoder = COMPRESSED_TENSORS

    def __init__(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> None:
        """Reads the scheme from config.json's `quantization_config`.

        Raises InputError where the config has no groups of pack-quantized weights, groups that differ in kind of zero
        point, or none for a packed linear, or tells engines to ignore one.
        """
        config = index.folder / CONFIG_FILE
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups or quantization.get("format") != PACKED:
            raise InputError(
                f"{config}: only compressed-tensors of format 'pack-quantized' with config groups can be read, "
                f"found format {quantization.get('format')!r} with config_groups {groups!r:.80}"
            )
        groups = [_weights_group(config, group) for group in groups.values()]
        self._groups = [group for group in groups if group.get("format") != FLOAT]
        float_groups = [group for group in groups if group.get("format") == FLOAT]
        alike = {group["weights"].get("symmetric", True) for group in self._groups}
        if len(alike) > 1:
            raise InputError(f"{config}: config groups with and without zero points cannot be read")
        self._sizes = [whole_number(config, group["weights"], "group_size", 128, None) for group in self._groups]
        zero_points = ("weight_zero_point",) if not all(alike) else ()
        self.companions = ("weight_scale", "weight_shape", *zero_points)
        super().__init__(index, config, float_groups, device)
        self._check_not_ignored(config, named_modules(config, "ignore", quantization.get("ignore") or []))
        self._group_of = {prefix: self._matching_group(config, prefix) for prefix in self._packed.values()}
        for prefix in self._packed.values():
            bits = self._bits(prefix)
            scales = checked_matrix(index, prefix + "weight_scale", ("BF16", "F16", "F32"), None)
            rows, groups_of_row = scales.shape
            words = -(-groups_of_row * self._size(prefix) * bits // 32)
            checked_matrix(index, prefix + self.marker, ("I32",), (rows, words))
            checked_matrix(index, prefix + "weight_shape", ("I64", "I32"), (2,))
            for part in zero_points:
                checked_matrix(index, prefix + part, ("I32",), (-(-rows * bits // 32), groups_of_row))
            if not zero_points and (stored := index.get(prefix + "weight_zero_point")) is not None:
                raise InputError(f"{stored.path}: tensor {stored.label} is there, but {config} says symmetric")

    def _check_not_ignored(self, config: Path, ignored: Sequence[str]) -> None:
        """Refuses packed linears that engines are told to take for plain ones."""
        named, expressions = set(ignored), [entry for entry in ignored if entry.startswith("re:")]
        for name in (prefix.removesuffix(".") for prefix in self._packed.values()):
            found = [name] if name in named else [entry for entry in expressions if is_target(name, entry)]
            if found:
                raise InputError(f"{config}: {name!r} is packed, but 'ignore' has {found[0]!r}")

    def _matching_group(self, config: Path, prefix: str) -> int:
        """Returns the number of the group whose targets name a packed linear, or its class."""
        name = prefix.removesuffix(".")
        for number, group in enumerate(self._groups):
            if any(is_target(name, target) for target in group["targets"]):
                return number
        for number, group in enumerate(self._groups):
            if "Linear" in group["targets"]:
                return number
        raise InputError(f"{config}: {name!r} is packed, but no config group has it as a target")

    def _bits(self, prefix: str) -> int:
        return int(self._groups[self._group_of[prefix]]["weights"].get("num_bits", 4))

    def _size(self, prefix: str) -> int:
        """Returns the weights of a group."""
        return self._sizes[self._group_of[prefix]]

    @cached_property
    def grids(self) -> Mapping[str, Grid]:
        """Packed linear -> its grid."""
        symmetric = "weight_zero_point" not in self.companions
        return {
            prefix.removesuffix("."): Grid(self._bits(prefix), self._size(prefix), symmetric)
            for prefix in self._packed.values()
        }

    @cached_property
    def _schemes(self) -> list[Any]:
        return [scheme_of(self.index.folder / CONFIG_FILE, group) for group in self._groups]

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        groups = self.index[prefix + "weight_scale"].shape[-1]
        return self.index[prefix + self.marker].shape[0], groups * self._size(prefix)

    def check_shapes(self) -> None:
        """Raises InputError where a packed linear says that it has another shape than its codes and scales make; reads
        16 bytes of each."""
        for prefix in self._packed.values():
            self._check_shape(prefix, self.index.read(prefix + "weight_shape"))

    def _check_shape(self, prefix: str, stated: torch.Tensor) -> None:
        info, shape = self.index[prefix + "weight_shape"], self.packed_shape(prefix)
        found = tuple(stated.tolist())
        if found != shape:
            raise InputError(
                f"{info.path}: tensor {info.label} says {list(found)}, but codes and scales of the linear make "
                f"{list(shape)}; the checkpoint is damaged: download the file again"
            )

    def packed_scheme(self, prefix: str) -> Grid:
        return self.grids[prefix.removesuffix(".")]

    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes through compressed-tensors' own decompressor, in float32; raises InputError where the linear says
        that it has another shape than its codes and scales make."""
        compressor, tensors = load(*self.decoder).PackedQuantizationCompressor, self._parts(prefix)
        self._check_shape(prefix, tensors["weight_shape"])
        tensors["weight_scale"] = tensors["weight_scale"].float()
        scheme = self._schemes[self._group_of[prefix]]
        weight: torch.Tensor = compressor.decompress(tensors, scheme)["weight"]
        return weight.float()
