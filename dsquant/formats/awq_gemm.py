"""AutoAWQ's GEMM layout, which vLLM, SGLang, transformers and AutoAWQ read as `quant_method: awq`.

Shape legend: O out features, I in features, G groups along I.

qweight int32 [I, O/8] and qzeros int32 [G, O/8] hold eight codes in each word, those of columns 0, 2, 4, 6, 1, 3, 5, 7
from the lowest bits up; scales float16 [G, O]. (Layout: autoawq 0.2.9, `awq.utils.packing_utils`.)
"""

from collections.abc import Mapping
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.protocol import NO_CHOICE
from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.formats.shards import StoredTensor
from dsquant.formats.skip_lists import skipped_modules
from dsquant.kernels.packing import pack_awq, unpack_awq
from dsquant.schemes import UNQUANTIZED, Grid, QuantizedWeight, group_size_hint

BITS = 4
# vLLM's and autoawq's kernels work on this many output columns at a time.
OUT_MULTIPLE = 64


class AwqGemm(SafetensorsFormat):
    """The format `awq`."""

    name = "awq"
    widths = (BITS, UNQUANTIZED)

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses other than 4 bits, and shapes that groups or kernels do not divide.

        Args:
            grid: the quantization grid.
            shapes: linear -> [O, I].

        Raises:
            UsageError: naming the linear.
        """
        if grid.bits != BITS:
            raise UsageError(f"the awq format holds 4-bit weights only, not {grid.bits}; use --to compressed-tensors")
        for linear, (rows, columns) in shapes.items():
            if rows % OUT_MULTIPLE:
                raise UsageError(
                    f"{linear}: shape [{rows}, {columns}] does not suit the awq format: the rows must be a multiple of "
                    f"{OUT_MULTIPLE}; use --to compressed-tensors"
                )
            if columns % grid.group_size:
                raise UsageError(
                    f"{linear}: shape [{rows}, {columns}]: the columns must be a multiple of --group-size "
                    f"{grid.group_size}; {group_size_hint(columns)}"
                )

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        """qweight, qzeros and scales.

        Args:
            linear: its module name.
            shape: [O, I].
            grid: the quantization grid.

        Returns:
            Names, dtypes and shapes.
        """
        rows, columns = shape
        groups = columns // grid.group_size
        return [
            StoredTensor(f"{linear}.qweight", "I32", (columns, rows // 8)),
            StoredTensor(f"{linear}.qzeros", "I32", (groups, rows // 8)),
            StoredTensor(f"{linear}.scales", "F16", (groups, rows)),
        ]

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packs the codes, the zero points and the scales.

        Args:
            linear: its module name.
            weight: the weight.

        Returns:
            Tensor name -> tensor.
        """
        return {
            f"{linear}.qweight": pack_awq(weight.codes_OI),
            f"{linear}.qzeros": pack_awq(weight.zero_points_OG),
            f"{linear}.scales": weight.scales_OG.T.contiguous().to(torch.float16),
        }

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Undoes `pack`.

        Args:
            linear: its module name.
            tensors: tensor name -> tensor, as `stored` announced.
            grid: the quantization grid.

        Returns:
            The weight.
        """
        return QuantizedWeight(
            unpack_awq(tensors[f"{linear}.qweight"]),
            tensors[f"{linear}.scales"].float().T.contiguous(),
            unpack_awq(tensors[f"{linear}.qzeros"]),
            grid,
        )

    def quantization_config(
        self, grid: Grid, linears: Mapping[str, bool], widths: Mapping[str, int] = NO_CHOICE
    ) -> dict[str, Any]:
        """AutoAWQ's config. `zero_point` is true for symmetric grids too: qzeros are there, all 8.

        Args:
            grid: the quantization grid.
            linears: every linear of the decoder -> whether it is quantized.
            widths: linear -> bits, where widths were chosen: 4 for all that are quantized.

        Returns:
            Plain JSON values.
        """
        return {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": skipped_modules(linears),
        }
