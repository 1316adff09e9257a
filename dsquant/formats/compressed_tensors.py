"""compressed-tensors' pack-quantized layout, which vLLM, SGLang and transformers read.

Shape legend: O out features, I in features, G groups along I, B bits of a code.

weight_packed int32 [O, ceil(I * B / 32)] is a dense stream of B-bit codes along I, the first in the lowest bits (a
3-bit code may straddle two words); weight_scale bfloat16 [O, G]; weight_shape int64 [2]; and where the grid is
asymmetric weight_zero_point int32 [ceil(O * B / 32), G], packed along O. (Layout: compressed-tensors 0.20,
`compressors/pack_quantized`.)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.protocol import NO_CHOICE
from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.formats.shards import StoredTensor
from dsquant.formats.skip_lists import ignored_modules, targets_by_width
from dsquant.kernels.packing import pack_rows, unpack_rows
from dsquant.kernels.values import WORD_BITS
from dsquant.schemes import UNQUANTIZED, Grid, QuantizedWeight, group_size_hint


class CompressedTensors(SafetensorsFormat):
    """The format `compressed-tensors`."""

    name = "compressed-tensors"
    widths = (3, 4, 8, UNQUANTIZED)

    def default_symmetric(self, mixture: bool) -> bool | None:
        """Whether its engines want no zero points: vLLM's mixture kernels take it only so.

        Args:
            mixture: whether the model has routed experts.

        Returns:
            True, false, or None where there is no choice.
        """
        return mixture

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses groups that do not divide a linear, and zero points in experts.

        Args:
            grid: the quantization grid.
            shapes: linear -> [O, I].

        Raises:
            UsageError: naming the linear.
        """
        for linear, (rows, columns) in shapes.items():
            if columns % grid.group_size:
                raise UsageError(
                    f"{linear}: shape [{rows}, {columns}]: the columns must be a multiple of --group-size "
                    f"{grid.group_size}; {group_size_hint(columns)}"
                )
            if ".experts." in linear and not grid.symmetric:
                raise UsageError(
                    f"{linear}: vLLM's mixture-of-experts kernels take compressed-tensors weights only without zero "
                    "points; add --symmetric, or use --to awq"
                )

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        """weight_packed, weight_scale, weight_shape, and zero points where the grid has them.

        Args:
            linear: its module name.
            shape: [O, I].
            grid: the quantization grid.

        Returns:
            Names, dtypes and shapes.
        """
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
        """Packs the codes, the scales and, where they vary, the zero points.

        Args:
            linear: its module name.
            weight: the weight.

        Returns:
            Tensor name -> tensor.
        """
        tensors = {
            f"{linear}.weight_packed": pack_rows(weight.codes_OI, weight.grid.bits),
            f"{linear}.weight_scale": weight.scales_OG.to(torch.bfloat16),
            f"{linear}.weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
        }
        if not weight.grid.symmetric:
            packed = pack_rows(weight.zero_points_OG.T, weight.grid.bits)
            tensors[f"{linear}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Undoes `pack`.

        Args:
            linear: its module name.
            tensors: tensor name -> tensor, as `stored` announced.
            grid: the quantization grid.

        Returns:
            The weight.
        """
        rows, columns = tensors[f"{linear}.weight_shape"].tolist()
        scales_OG = tensors[f"{linear}.weight_scale"].float()
        zero_points_OG = torch.full(scales_OG.shape, grid.middle, dtype=torch.uint8)
        if not grid.symmetric:
            packed = tensors[f"{linear}.weight_zero_point"].T.contiguous()
            zero_points_OG = unpack_rows(packed, rows, grid.bits).T.contiguous()
        codes_OI = unpack_rows(tensors[f"{linear}.weight_packed"], columns, grid.bits)
        return QuantizedWeight(codes_OI, scales_OG, zero_points_OG, grid)

    def quantization_config(
        self, grid: Grid, linears: Mapping[str, bool], widths: Mapping[str, int] = NO_CHOICE
    ) -> dict[str, Any]:
        """The config that compressed-tensors 0.20 writes for weights only.

        Args:
            grid: the quantization grid.
            linears: every linear of the decoder -> whether it is quantized.
            widths: linear -> bits, where widths were chosen.

        Returns:
            Plain JSON values.
        """
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
    """One scheme and the linears that have it."""
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
