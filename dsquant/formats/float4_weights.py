"""Reads floats of four bits in blocks: NVFP4 and MXFP4 of compressed-tensors, and NVFP4 of ModelOpt.

Decoded bit by bit in PyTorch, in float32: compressed-tensors' own decoder gives bfloat16, and ModelOpt's package runs
on few machines. FP8 blocks beside them go through compressed-tensors.

Shape legend: O out features, I in features, B blocks along I.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.formats.beside_fp8 import FLOAT, BesideFp8
from dsquant.formats.compressed_tensors_weights import named_modules
from dsquant.formats.decoded import checked_matrix, whole_number
from dsquant.schemes.floats import E2M1_VALUES, Mxfp4, Nvfp4
from dsquant.source.checkpoint import CONFIG_FILE
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

EXPONENT_BIAS = 127  # of E8M0


@dataclass(frozen=True)
class Layout:
    """The tensors of a linear: codes two in a byte, the even column in the low bits; scales; and for NVFP4 the scale of
    the tensor."""

    name: str
    """compressed-tensors' name of it, or ModelOpt's method."""
    scheme: Nvfp4 | Mxfp4
    codes: str
    """uint8 [O, I / 2]."""
    scales: str = "weight_scale"
    """[O, B], E4M3 of NVFP4 and the exponent of MXFP4."""
    tensor_scale: str = ""
    """float32, of one element; MXFP4 has none."""
    divides: bool = False
    """Whether scales are divided by the scale of the tensor; else they are multiplied."""
    input_scale: str = ""
    """float32, of one element, where activations are rounded."""

    @property
    def scale_dtype(self) -> str:
        return "F8_E4M3" if isinstance(self.scheme, Nvfp4) else "U8"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that every linear has."""
        return tuple(filter(None, (self.codes, self.scales, self.tensor_scale)))


NVFP4 = Layout(
    "nvfp4-pack-quantized", Nvfp4(), "weight_packed",
    tensor_scale="weight_global_scale", divides=True, input_scale="input_global_scale",
)  # fmt: skip
MXFP4 = Layout("mxfp4-pack-quantized", Mxfp4(), "weight_packed")
MODELOPT = Layout("modelopt", Nvfp4(), "weight", tensor_scale="weight_scale_2", input_scale="input_scale")

# compressed-tensors' layouts of floats.
FLOATS = (NVFP4.name, MXFP4.name)


def groups_of(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the config groups of compressed-tensors, each with its format; none where there are no objects."""
    groups = quantization.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [{"format": quantization.get("format"), **group} for group in found if isinstance(group, dict)]


class Float4Weights(BesideFp8):
    """A checkpoint in one of the layouts."""

    decoder = None

    def __init__(
        self, index: ShardIndex, quantization: Mapping[str, Any], layout: Layout, device: torch.device = CPU
    ) -> None:
        """Raises InputError where config.json describes anything but this layout and FP8 blocks, or tensors contradict
        it."""
        config = index.folder / CONFIG_FILE
        self.layout = layout
        self.marker = layout.tensor_scale or layout.codes
        self.companions = tuple(part for part in layout.parts if part != self.marker)
        groups = [] if layout is MODELOPT else groups_of(quantization)
        for group in groups:
            if group["format"] != FLOAT:
                _check_group(config, group, layout)
        if layout is MODELOPT:
            whole_number(config, quantization, "group_size", layout.scheme.group_size, (layout.scheme.group_size,))
        super().__init__(index, config, [group for group in groups if group["format"] == FLOAT], device)
        of_inputs = f".{layout.input_scale}"
        self.names = {name: None for name in self.names if not (layout.input_scale and name.endswith(of_inputs))}
        for prefix in self._packed.values():
            rows, half = checked_matrix(index, prefix + layout.codes, ("U8",), None).shape
            scales = (rows, 2 * half // layout.scheme.group_size)
            checked_matrix(index, prefix + layout.scales, (layout.scale_dtype,), scales)
            for number in filter(None, (layout.tensor_scale, layout.input_scale)):
                if prefix + number in index:
                    _check_number(index, prefix + number)

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        rows, half = self.index[prefix + self.layout.codes].shape
        return rows, 2 * half

    def packed_scheme(self, prefix: str) -> Nvfp4 | Mxfp4:
        return self.layout.scheme

    def decode(self, prefix: str) -> torch.Tensor:
        """Computes value * scale, in float32."""
        parts = self._parts(prefix)
        magnitudes = torch.tensor(E2M1_VALUES, device=self.device)
        values = torch.cat([magnitudes, -magnitudes])
        bytes_ = parts[self.layout.codes].int()
        values_OI = values[torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1)]
        scales_OB = parts[self.layout.scales].float()
        if not self.layout.tensor_scale:
            scales_OB = torch.exp2(scales_OB - EXPONENT_BIAS)
        elif self.layout.divides:
            scales_OB = scales_OB / parts[self.layout.tensor_scale]
        else:
            scales_OB = scales_OB * parts[self.layout.tensor_scale]
        return (values_OI.unflatten(1, (scales_OB.shape[1], -1)) * scales_OB.unsqueeze(-1)).flatten(1)


def _check_group(config: Path, group: Mapping[str, Any], layout: Layout) -> None:
    named_modules(config, "targets", group.get("targets"))
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    found = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"), weights.get("symmetric", True))
    wanted = (4, "float", layout.scheme.group_size, True)
    if group["format"] != layout.name or found != wanted:
        raise InputError(
            f"{config}: beside config groups {layout.name!r} of symmetric 4-bit floats in blocks of {wanted[2]} only "
            f"FP8 blocks can be read, found {group!r:.120}"
        )


def _check_number(index: ShardIndex, name: str) -> None:
    info = index[name]
    if info.dtype != "F32" or info.shape not in ((), (1,)):
        raise InputError(
            f"{info.path}: tensor {info.label} is {info.dtype} of shape {list(info.shape)}; expected one F32 number"
        )
