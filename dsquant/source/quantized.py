"""Reads quantized checkpoints as lazy weights: each linear is decoded on access by the package that defines its format.

dsquant's own packer is not used: a mistake in it must not cancel out when the output is judged.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.packages import load
from dsquant.source.shards import ShardIndex, TensorInfo
from dsquant.source.weights import CPU, Weights

AWQ_GROUP_SIZES = (16, 32, 64, 128, 256)


def _whole_number(
    config: Path, values: Mapping[str, Any], key: str, default: int, allowed: tuple[int, ...] | None
) -> int:
    """Returns a positive number of config.json, one of those allowed where they are given."""
    found = values.get(key, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1 or (allowed and found not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "a positive number"
        raise InputError(f"{config}: quantization_config has {key} {found!r:.40}; expected {wanted}")
    return found


def _checked(index: ShardIndex, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> TensorInfo:
    """Returns a matrix's place; refuses a dtype or shape that the layout does not have."""
    info = index[name]
    if info.dtype not in dtypes or (len(info.shape) != 2 if shape is None else info.shape != shape):
        wanted = "two dimensions" if shape is None else f"shape {list(shape)}"
        raise InputError(
            f"{info.path}: tensor {info.label} is {info.dtype} of shape {list(info.shape)}; expected "
            f"{' or '.join(dtypes)} with {wanted}, to match the related tensors and config.json"
        )
    return info


class DecodedWeights(Weights):
    """name -> float32 tensor of a checkpoint whose linears are packed, under the original's names."""

    marker: str
    """The ending of the tensor that marks a packed linear."""
    companions: tuple[str, ...]
    """The endings of the other tensors that decoding needs."""
    decoder: tuple[str, str]
    """The package that decodes it, and the module."""

    def __init__(self, index: ShardIndex, device: torch.device) -> None:
        """Finds the packed linears; raises InputError where one lacks one of its tensors."""
        self.index = index
        self.device = device
        self._packed = {
            name.removesuffix(self.marker) + "weight": name.removesuffix(self.marker)
            for name in index
            if name.endswith("." + self.marker)
        }
        for prefix in self._packed.values():
            for part in self.companions:
                if prefix + part not in index:
                    raise InputError(
                        f"{index[prefix + self.marker].path}: {prefix + self.marker!r} has no {prefix + part!r} in any "
                        "shard; the checkpoint is incomplete"
                    )
        parts = {prefix + part for prefix in self._packed.values() for part in (self.marker, *self.companions)}
        self._names = dict.fromkeys([*(name for name in index if name not in parts), *self._packed])

    @abstractmethod
    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes the linear whose tensors begin with `prefix`, float32 [O, I]."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads some rows of a weight; a packed one is decoded as a whole."""
        if name in self._packed:
            return self.decode(self._packed[name])[start_row:stop_row]
        return self.index.read(name, start_row, stop_row).to(self.device).float()

    def _parts(self, prefix: str) -> dict[str, torch.Tensor]:
        parts = (self.marker, *self.companions)
        return {part: self.index.read(prefix + part).to(self.device) for part in parts}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the weight's shape."""
        if name not in self._packed:
            return self.index.require(name).shape
        return self.packed_shape(self._packed[name])

    @abstractmethod
    def packed_shape(self, prefix: str) -> tuple[int, int]:
        """Returns [O, I] of a packed linear, from headers."""


class AwqWeights(DecodedWeights):
    """AutoAWQ's GEMM layout, decoded by autoawq."""

    marker = "qweight"
    companions = ("qzeros", "scales")
    decoder = ("autoawq", "awq.utils.packing_utils")

    def __init__(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> None:
        """Reads bits and group size from config.json's `quantization_config`.

        Raises InputError where the config is not of this layout, or tensors contradict it.
        """
        super().__init__(index, device)
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm":
            raise InputError(f"{index.folder}/config.json: awq version {version!r} is not supported, only 'gemm' is")
        config = index.folder / "config.json"
        self._bits = _whole_number(config, quantization, "bits", 4, (4,))
        self._group_size = _whole_number(config, quantization, "group_size", 128, AWQ_GROUP_SIZES)
        for prefix in self._packed.values():
            qweight = _checked(index, prefix + "qweight", ("I32",), None)
            columns, words = qweight.shape
            groups = columns // self._group_size
            _checked(index, prefix + "qzeros", ("I32",), (groups, words))
            _checked(index, prefix + "scales", ("F16", "BF16", "F32"), (groups, words * 32 // self._bits))

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        """Returns [O, I]."""
        columns, words = self.index[prefix + "qweight"].shape
        return words * 32 // self._bits, columns

    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes through autoawq's `dequantize_gemm`, in float32."""
        qweight, qzeros, scales = self._parts(prefix).values()
        dequantize = load(*self.decoder).dequantize_gemm
        return dequantize(qweight, qzeros, scales.float(), self._bits, self._group_size).T.contiguous()


def _weights_group(config: Path, group: Any) -> dict[str, Any]:
    """Returns a config group; refuses one that does not say how weights are stored."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{config}: the config group has no object 'weights', found {group!r:.80}")
    _whole_number(config, weights, "num_bits", 4, tuple(range(2, 9)))
    if not isinstance(group.get("targets", []), list):
        raise InputError(f"{config}: a config group's targets must be a list, found {group['targets']!r:.80}")
    return group


def _is_target(name: str, target: Any) -> bool:
    """Returns whether a group's target is a module's name, or an expression that matches it."""
    if not isinstance(target, str):
        return False
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


class CompressedTensorsWeights(DecodedWeights):
    """compressed-tensors' pack-quantized layout, decoded by compressed-tensors."""

    marker = "weight_packed"
    decoder = ("compressed-tensors", "compressed_tensors.compressors")

    def __init__(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> None:
        """Reads the scheme from config.json's `quantization_config`.

        Raises InputError where the config has no groups of pack-quantized weights, groups that differ in size or kind
        of zero point, or none for a packed linear.
        """
        config = index.folder / "config.json"
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups or quantization.get("format") != "pack-quantized":
            raise InputError(
                f"{config}: only compressed-tensors of format 'pack-quantized' with config groups can be read, "
                f"found format {quantization.get('format')!r} with config_groups {groups!r:.80}"
            )
        self._groups = [_weights_group(config, group) for group in groups.values()]
        alike = {
            (group["weights"].get("group_size"), group["weights"].get("symmetric", True)) for group in self._groups
        }
        if len(alike) > 1:
            raise InputError(
                f"{config}: config groups that differ in more than bits cannot be read, found group sizes and symmetry "
                f"{sorted(alike, key=str)}"
            )
        weights = self._groups[0]["weights"]
        self._group_size = _whole_number(config, weights, "group_size", 128, None)
        zero_points = () if weights.get("symmetric", True) else ("weight_zero_point",)
        self.companions = ("weight_scale", "weight_shape", *zero_points)
        super().__init__(index, device)
        self._group_of = {prefix: self._matching_group(config, prefix) for prefix in self._packed.values()}
        for prefix in self._packed.values():
            bits = self._bits(prefix)
            scales = _checked(index, prefix + "weight_scale", ("BF16", "F16", "F32"), None)
            rows, groups_of_row = scales.shape
            words = -(-groups_of_row * self._group_size * bits // 32)
            _checked(index, prefix + self.marker, ("I32",), (rows, words))
            _checked(index, prefix + "weight_shape", ("I64", "I32"), (2,))
            for part in zero_points:
                _checked(index, prefix + part, ("I32",), (-(-rows * bits // 32), groups_of_row))

    def _matching_group(self, config: Path, prefix: str) -> int:
        """Returns the number of the group whose targets name a packed linear, or its class."""
        name = prefix.removesuffix(".")
        for number, group in enumerate(self._groups):
            if any(_is_target(name, target) for target in group.get("targets", ())):
                return number
        for number, group in enumerate(self._groups):
            if "Linear" in group.get("targets", ()) or len(self._groups) == 1:
                return number
        raise InputError(f"{config}: {name!r} is packed, but no config group has it as a target")

    def _bits(self, prefix: str) -> int:
        return int(self._groups[self._group_of[prefix]]["weights"].get("num_bits", 4))

    @cached_property
    def _schemes(self) -> list[Any]:
        scheme = load(self.decoder[0], "compressed_tensors.quantization").QuantizationScheme
        return [scheme.model_validate(group) for group in self._groups]

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        """Returns [O, I], where I follows from the scales and the group size."""
        groups = self.index[prefix + "weight_scale"].shape[-1]
        return self.index[prefix + self.marker].shape[0], groups * self._group_size

    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes through compressed-tensors' own decompressor, in float32."""
        compressor = load(*self.decoder).PackedQuantizationCompressor
        tensors = self._parts(prefix)
        tensors["weight_scale"] = tensors["weight_scale"].float()
        scheme = self._schemes[self._group_of[prefix]]
        weight: torch.Tensor = compressor.decompress(tensors, scheme)["weight"]
        return weight.float()


def check_decoder(format_name: str) -> None:
    """Imports the decoder of a format (a GGUF type too), so that a missing package is found before a job and not at its
    end.

    Raises PackageError where it cannot be imported.
    """
    decoders = {"awq": AwqWeights.decoder, "compressed-tensors": CompressedTensorsWeights.decoder}
    load(*decoders.get(format_name, ("gguf", "gguf.quants")))


def decoded_weights(index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> Weights:
    """Opens a quantized checkpoint's weights under the original's names; packed words are decoded on `device`.

    Raises InputError where the `quant_method` is unknown or the tensors contradict the config.
    """
    method = quantization.get("quant_method")
    if method == "awq":
        return AwqWeights(index, quantization, device)
    if method == "compressed-tensors":
        return CompressedTensorsWeights(index, quantization, device)
    raise InputError(
        f"{index.folder}/config.json: quant_method {method!r} is not supported; dsquant reads fp8 (128x128 blocks), "
        "awq and compressed-tensors (pack-quantized)"
    )
