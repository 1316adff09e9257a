"""Linears in FP8 blocks beside packed ones, in compressed-tensors' layout."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.formats.decoded import DecodedWeights, checked_matrix
from dsquant.formats.output_shards import StoredTensor
from dsquant.packages import load
from dsquant.schemes import Fp8Blocks
from dsquant.source.checkpoint import CONFIG_FILE, FP8
from dsquant.source.shards import ShardIndex

FLOAT = "float-quantized"
FP8_PARTS = ("weight", "weight_scale")
# The package that decodes FP8 blocks, and the module.
COMPRESSED_TENSORS = ("compressed-tensors", "compressed_tensors.compressors")


class BesideFp8(DecodedWeights):
    """Packed linears, and others in FP8 blocks, which compressed-tensors decodes."""

    def __init__(
        self, index: ShardIndex, config: Path, float_groups: Sequence[Mapping[str, Any]], device: torch.device
    ) -> None:
        """Takes the config groups of FP8 blocks from config.json; raises InputError where they are not of one size, or
        the tensors contradict them."""
        self._float_groups = float_groups
        self._blocks = _blocks(config, float_groups)
        super().__init__(index, device)
        self._fp8 = {name for name in self.names if name in index and index[name].dtype == FP8}
        for name in self._fp8:
            self._check_fp8(config, name)
        self.names = {name: None for name in self.names if name not in {f"{weight}_scale" for weight in self._fp8}}

    def _check_fp8(self, config: Path, name: str) -> None:
        """Refuses a weight in FP8 without a config group of blocks, or without their scales."""
        info = self.index[name]
        if self._blocks is None:
            raise InputError(f"{info.path}: tensor {info.label} is FP8, but {config} has no config group {FLOAT!r}")
        if f"{name}_scale" not in self.index:
            raise InputError(f"{info.path}: FP8 tensor {info.label} has no {name + '_scale'!r}; it is incomplete")
        rows, columns = checked_matrix(self.index, name, (FP8,), None).shape
        checked_matrix(self.index, f"{name}_scale", ("F32",), self._blocks.scale_shape((rows, columns)))

    @cached_property
    def _float_scheme(self) -> Any:
        return scheme_of(self.index.folder / CONFIG_FILE, self._float_groups[-1])

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads rows of a weight; a packed one, or one in FP8 blocks, is decoded as a whole."""
        if name not in self._fp8:
            return super().rows(name, start_row, stop_row)
        compressor = load(*COMPRESSED_TENSORS).FloatQuantizationCompressor
        parts = {part: self._read(name + part.removeprefix("weight")) for part in FP8_PARTS}
        weight: torch.Tensor = compressor.decompress(parts, self._float_scheme)["weight"]
        return weight[start_row:stop_row]

    def _stored(self, name: str) -> list[str]:
        return [name, f"{name}_scale"] if name in self._fp8 else super()._stored(name)


def scheme_of(config: Path, group: Mapping[str, Any]) -> Any:
    """Returns compressed-tensors' own object for a config group; raises InputError where it does not take the group."""
    scheme = load(COMPRESSED_TENSORS[0], "compressed_tensors.quantization").QuantizationScheme
    try:
        return scheme.model_validate(group)
    except ValueError as error:
        reason = " ".join(str(error).splitlines()[1:3]).strip()
        raise InputError(f"{config}: compressed-tensors refuses a config group: {reason:.200}") from error


def _blocks(config: Path, groups: Sequence[Mapping[str, Any]]) -> Fp8Blocks | None:
    """Returns the FP8 blocks of config groups; None without any. Raises InputError where they are no blocks."""
    found = {str(group["weights"].get("block_structure")): group["weights"] for group in groups}
    for weights in found.values():
        block = weights.get("block_structure")
        sizes = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        if len(found) > 1 or not sizes or weights.get("strategy") != "block" or weights.get("num_bits") != 8:
            raise InputError(
                f"{config}: of config groups {FLOAT!r} only FP8 blocks of one size can be read, found {weights!r:.120}"
            )
        return Fp8Blocks(*block)
    return None


def blocks_tensors(linear: str, shape: tuple[int, int], blocks: Fp8Blocks) -> tuple[StoredTensor, StoredTensor]:
    """Returns the tensors that a linear of shape [O, I] in blocks becomes: its codes and scales."""
    codes, scales = (f"{linear}.{part}" for part in FP8_PARTS)
    return StoredTensor(codes, FP8, shape), StoredTensor(scales, "F32", blocks.scale_shape(shape))


def blocks_group(blocks: Fp8Blocks) -> dict[str, Any]:
    """Returns the config group of weights in blocks, whose inputs engines round to FP8 in runs of a block's columns, as
    those of the release."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    block = {"strategy": "block", "block_structure": [blocks.rows, blocks.columns], "group_size": None}
    inputs = {"strategy": "group", "group_size": blocks.columns, "dynamic": True, "observer": None}
    return {
        "targets": ["Linear"],
        "weights": {**fp8, **block, "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {}},
        "input_activations": {**fp8, **inputs},
        "output_activations": None,
        "format": FLOAT,
    }
