"""AutoAWQ's GEMM layout, which vLLM, SGLang, transformers and AutoAWQ read as `quant_method: awq`.

Shape legend: O out features, I in features, G groups along I.

qweight int32 [I, O/8] and qzeros int32 [G, O/8] hold eight codes in each word, those of columns 0, 2, 4, 6, 1, 3, 5, 7
from the lowest bits up; scales float16 [G, O]. (Layout: autoawq 0.2.9, `awq.utils.packing_utils`.)
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from dsquant.errors import InputError, UsageError
from dsquant.formats.decoded import DecodedWeights, checked_matrix, whole_number
from dsquant.formats.integer_format import IntegerFormat
from dsquant.formats.output_shards import StoredTensor
from dsquant.formats.safetensors import check_columns
from dsquant.formats.skip_lists import skipped_modules
from dsquant.formats.wanted import Linears, Width
from dsquant.kernels.packing import pack_awq, unpack_awq
from dsquant.packages import load
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

BITS = 4
# vLLM's and autoawq's kernels work on this many output columns at a time.
OUT_MULTIPLE = 64
GROUP_SIZES = (16, 32, 64, 128, 256)


# A byte of two zero points of the symmetric grid, 8.
_TWO_MIDDLES = 0x88


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
        self._bits = whole_number(config, quantization, "bits", 4, (4,))
        self._group_size = whole_number(config, quantization, "group_size", 128, GROUP_SIZES)
        for prefix in self._packed.values():
            qweight = checked_matrix(index, prefix + "qweight", ("I32",), None)
            columns, words = qweight.shape
            groups = columns // self._group_size
            checked_matrix(index, prefix + "qzeros", ("I32",), (groups, words))
            checked_matrix(index, prefix + "scales", ("F16", "BF16", "F32"), (groups, words * 32 // self._bits))

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        columns, words = self.index[prefix + "qweight"].shape
        return words * 32 // self._bits, columns

    def packed_scheme(self, prefix: str) -> Grid:
        zero_points = self.index.read(prefix + "qzeros").view(torch.uint8)
        return Grid(self._bits, self._group_size, symmetric=bool((zero_points == _TWO_MIDDLES).all()))

    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes through autoawq's `dequantize_gemm`, in float32."""
        qweight, qzeros, scales = self._parts(prefix).values()
        dequantize = load(*self.decoder).dequantize_gemm
        return dequantize(qweight, qzeros, scales.float(), self._bits, self._group_size).T.contiguous()


class AwqGemm(IntegerFormat):
    """The format `awq`."""

    name = "awq"
    help = "AutoAWQ's GEMM layout, 4 bits"
    bits = (BITS,)
    decoder = AwqWeights.decoder

    def described(self, quantization: Mapping[str, Any]) -> str:
        return f"AWQ {quantization.get('bits', 4)} bits, groups of {quantization.get('group_size', 128)}"

    def decoded(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> AwqWeights:
        return AwqWeights(index, quantization, device)

    def library(self, widths: Collection[int], mixture: bool) -> str | None:
        return None if mixture else super().library(widths, mixture)

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        note = (
            "transformers (5.24) loads a mixture in the format awq without its experts' weights: serve it by vLLM or "
            "SGLang; for transformers take --to compressed-tensors"
        )
        return [note] if mixture else []

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        if grid.bits != BITS:
            raise UsageError(f"the awq format holds 4-bit weights only, not {grid.bits}; use --to compressed-tensors")
        for linear, (rows, columns) in shapes.items():
            if rows % OUT_MULTIPLE:
                raise UsageError(
                    f"{linear}: shape [{rows}, {columns}] does not suit the awq format: the rows must be a multiple of "
                    f"{OUT_MULTIPLE}; use --to compressed-tensors"
                )
            check_columns(linear, (rows, columns), grid)

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        rows, columns = shape
        groups = columns // grid.group_size
        return [
            StoredTensor(f"{linear}.qweight", "I32", (columns, rows // 8)),
            StoredTensor(f"{linear}.qzeros", "I32", (groups, rows // 8)),
            StoredTensor(f"{linear}.scales", "F16", (groups, rows)),
        ]

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return {
            f"{linear}.qweight": pack_awq(weight.codes_OI),
            f"{linear}.qzeros": pack_awq(weight.zero_points_OG),
            f"{linear}.scales": weight.scales_OG.T.contiguous().to(torch.float16),
        }

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        return QuantizedWeight(
            unpack_awq(tensors[f"{linear}.qweight"]),
            tensors[f"{linear}.scales"].float().T.contiguous(),
            unpack_awq(tensors[f"{linear}.qzeros"]),
            grid,
        )

    def quantization_config(self, grid: Grid, linears: Linears) -> dict[str, Any]:
        """Returns AutoAWQ's config; `zero_point` is true for symmetric grids too: qzeros are there, all 8."""
        return {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": skipped_modules(linears.quantized, linears.mtp_layer),
        }
