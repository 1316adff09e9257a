"""compressed-tensors' pack-quantized layout, which vLLM, SGLang and transformers read.

Shape legend: O out features, I in features, G groups along I, B bits of a code.

weight_packed int32 [O, ceil(I * B / 32)] is a dense stream of B-bit codes along I, the first in the lowest bits (a
3-bit code may straddle two words); weight_scale bfloat16 [O, G]; weight_shape int64 [2]; and where the grid is
asymmetric weight_zero_point int32 [ceil(O * B / 32), G], packed along O. (Layout: compressed-tensors 0.20,
`compressors/pack_quantized`.)
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError, UsageError
from dsquant.formats.decoded import DecodedWeights, checked_matrix, whole_number
from dsquant.formats.output_shards import StoredTensor
from dsquant.formats.safetensors import SafetensorsFormat, check_columns
from dsquant.formats.skip_lists import ignored_modules, targets_by_width
from dsquant.formats.wanted import NO_CHOICE, Width
from dsquant.kernels.packing import pack_rows, unpack_rows
from dsquant.kernels.values import WORD_BITS
from dsquant.packages import load
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU


def _weights_group(config: Path, group: Any) -> dict[str, Any]:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise InputError(f"{config}: the config group has no object 'weights', found {group!r:.80}")
    whole_number(config, weights, "num_bits", 4, tuple(range(2, 9)))
    if not isinstance(group.get("targets", []), list):
        raise InputError(f"{config}: a config group's targets must be a list, found {group['targets']!r:.80}")
    return group


def _is_target(name: str, target: Any) -> bool:
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
        self._group_size = whole_number(config, weights, "group_size", 128, None)
        zero_points = () if weights.get("symmetric", True) else ("weight_zero_point",)
        self.companions = ("weight_scale", "weight_shape", *zero_points)
        super().__init__(index, device)
        self._group_of = {prefix: self._matching_group(config, prefix) for prefix in self._packed.values()}
        for prefix in self._packed.values():
            bits = self._bits(prefix)
            scales = checked_matrix(index, prefix + "weight_scale", ("BF16", "F16", "F32"), None)
            rows, groups_of_row = scales.shape
            words = -(-groups_of_row * self._group_size * bits // 32)
            checked_matrix(index, prefix + self.marker, ("I32",), (rows, words))
            checked_matrix(index, prefix + "weight_shape", ("I64", "I32"), (2,))
            for part in zero_points:
                checked_matrix(index, prefix + part, ("I32",), (-(-rows * bits // 32), groups_of_row))

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


class CompressedTensors(SafetensorsFormat):
    """The format `compressed-tensors`."""

    name = "compressed-tensors"
    help = "pack-quantized, 4, 8 or 3 bits"
    bits = (4, 8, 3)
    rank = 0
    decoder = CompressedTensorsWeights.decoder

    def described(self, quantization: Mapping[str, Any]) -> str:
        schemes = [group["weights"] for group in quantization["config_groups"].values()]
        bits = " and ".join(str(weights["num_bits"]) for weights in schemes)
        return f"compressed-tensors {bits} bits, groups of {schemes[0]['group_size']}"

    def decoded(
        self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU
    ) -> CompressedTensorsWeights:
        return CompressedTensorsWeights(index, quantization, device)

    def default_symmetric(self, mixture: bool) -> bool | None:
        """All engines take it without zero points."""
        return True

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        found = "the target needs linears of 3 bits" if to_choose else "linears of 3 bits"
        three = (
            f"{found}: compressed-tensors and transformers decode them, vLLM and SGLang have kernels for 4 and 8 bits "
            "alone (a recent vLLM for 2 to 8)"
        )
        asymmetric = (
            "zero points in the format compressed-tensors: transformers (5.24) does not load them, and with 8 or 3 bits"
            " few kernels take them (vLLM 0.33's Humming); leave --asymmetric out"
        )
        return [three] * (3 in widths) + [asymmetric] * (not symmetric)

    def mixed_notes(self, widths: Collection[Width], mixture: bool) -> list[str]:
        note = (
            f"linears have {' and '.join(map(str, sorted(widths)))} bits, by the names in config.json, which vLLM and "
            "SGLang follow; transformers (5.24) decodes a mixture's linears as if all were alike: do not load it there"
        )
        return [note] if mixture else []

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        for linear, shape in shapes.items():
            check_columns(linear, shape, grid)
            if ".experts." in linear and not grid.symmetric:
                raise UsageError(
                    f"{linear}: vLLM's mixture-of-experts kernels take compressed-tensors weights only without zero "
                    "points; add --symmetric, or use --to awq"
                )

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        rows, columns = shape
        groups = columns // grid.group_size
        tensors = [
            StoredTensor(f"{linear}.weight_packed", "I32", (rows, math.ceil(columns * grid.bits / WORD_BITS))),
            StoredTensor(f"{linear}.weight_scale", "BF16", (rows, groups)),
            StoredTensor(f"{linear}.weight_shape", "I64", (2,)),
        ]
        if not grid.symmetric:
            packed_rows = math.ceil(rows * grid.bits / WORD_BITS)
            tensors.append(StoredTensor(f"{linear}.weight_zero_point", "I32", (packed_rows, groups)))
        return tensors

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        tensors = {
            f"{linear}.weight_packed": pack_rows(weight.codes_OI, weight.grid.bits),
            f"{linear}.weight_scale": weight.scales_OG.to(torch.bfloat16),
            f"{linear}.weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
        }
        if not weight.grid.levels.symmetric:
            packed = pack_rows(weight.zero_points_OG.T, weight.grid.bits)
            tensors[f"{linear}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        rows, columns = tensors[f"{linear}.weight_shape"].tolist()
        scales_OG = tensors[f"{linear}.weight_scale"].float()
        zero_points_OG = torch.full(scales_OG.shape, grid.middle, dtype=torch.uint8)
        if not grid.symmetric:
            packed = tensors[f"{linear}.weight_zero_point"].T.contiguous()
            zero_points_OG = unpack_rows(packed, rows, grid.bits).T.contiguous()
        codes_OI = unpack_rows(tensors[f"{linear}.weight_packed"], columns, grid.bits)
        return QuantizedWeight(codes_OI, scales_OG, zero_points_OG, grid)

    def quantization_config(
        self, grid: Grid, linears: Mapping[str, bool], widths: Mapping[str, int] = NO_CHOICE, mtp_layer: str = ""
    ) -> dict[str, Any]:
        """Returns the config that compressed-tensors 0.20 writes for weights only."""
        targets = targets_by_width(widths) if widths else {grid.bits: ["Linear"]}
        groups = [_config_group(grid.with_bits(bits), names) for bits, names in targets.items()]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": ignored_modules(linears),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _config_group(grid: Grid, targets: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
