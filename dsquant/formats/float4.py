"""NVFP4 and MXFP4, floats of four bits in blocks, as engines read them from safetensors.

Shape legend: O out features, I in features, B blocks along I.

A byte holds the codes of two neighbouring columns, the even one in its low bits. NVFP4 has blocks of 16: weight_scale
E4M3 [O, B], and one float32 scale of the tensor that they are in units of; MXFP4 blocks of 32: weight_scale uint8 [O,
B], the exponent of a power of two. compressed-tensors stores weight_packed uint8 [O, I / 2] and, as
weight_global_scale, what its scales are divided by; ModelOpt weight and, as weight_scale_2, what they are multiplied
by. Where engines round inputs to NVFP4, input_global_scale, or input_scale, does so for their scales: with it the
largest input that calibration has seen is the largest that a block holds. (Layouts: compressed-tensors 0.20,
`compressors/nvfp4` and `compressors/mxfp4`; ModelOpt 0.47, `quantization/qtensor/nvfp4_tensor`.)

Linears that engines fuse read one input; those share the scale of the tensor (`schemes.fitted_together`).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.beside_fp8 import COMPRESSED_TENSORS, FLOAT, blocks_group, blocks_tensors
from dsquant.formats.float4_weights import EXPONENT_BIAS, MODELOPT, MXFP4, NVFP4, Float4Weights, Layout, groups_of
from dsquant.formats.output_shards import StoredTensor
from dsquant.formats.protocol import OF_WEIGHTS_ALONE
from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.formats.skip_lists import ignored_modules, skipped_modules, targets_by_width
from dsquant.formats.wanted import Linears, Wanted, Width
from dsquant.presets import Activations
from dsquant.recipes import Recipe
from dsquant.schemes import Fp8Blocks, QuantizedWeight
from dsquant.schemes.floats import E2M1_VALUES, LARGEST_E4M3, Mxfp4, Nvfp4, codes_of_bits, e2m1_bits
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

Floats = Nvfp4 | Mxfp4
BITS = 4
# ModelOpt's word for NVFP4 of weights and inputs.
WITH_INPUTS = "NVFP4"
# The largest magnitude that blocks hold before the scale of the tensor.
LARGEST = E2M1_VALUES[-1] * LARGEST_E4M3


class Float4(SafetensorsFormat[Floats]):
    """A layout of NVFP4 or MXFP4."""

    bits = (BITS,)
    rank = 2
    layout: Layout
    words: str
    """Its name in reports."""
    tried: str
    """What has run or read its outputs (docs/engines.md)."""

    def described(self, quantization: Mapping[str, Any]) -> str:
        blocks = any(group["format"] == FLOAT for group in groups_of(quantization))
        return f"{self.words}, blocks of {self.layout.scheme.group_size}" + ", the rest in FP8 blocks" * blocks

    def decoded(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> Float4Weights:
        return Float4Weights(index, quantization, self.layout, device)

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        return [f"the format {self.name} has been {self.tried}"]

    def scheme(self, wanted: Wanted, group_size: int, output: str) -> Floats:
        recipe, alone = wanted.recipe, len(wanted.recipe.to) == 1
        if recipe.bits != BITS:
            raise UsageError(f"--to {self.name} holds 4-bit floats only, not {recipe.bits} bits; leave --bits out")
        if alone and recipe.symmetric is False:
            raise UsageError(f"--to {self.name}: floats have no zero points; leave --asymmetric out")
        if alone and recipe.group_size in (32, 64) and recipe.group_size != group_size:
            raise UsageError(f"--to {self.name} has blocks of {group_size} weights; leave --group-size out")
        scheme = replace(self.layout.scheme, output=output)
        return replace(scheme, inputs=recipe.activations in self.activations) if isinstance(scheme, Nvfp4) else scheme

    def check_activations(self, recipe: Recipe, grid: Floats, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Takes any linear of whole blocks."""

    def activation_notes(self, kind: Activations, mixture: bool, fp8: bool) -> list[str]:
        engines = (
            "by their sources vLLM 0.33 and SGLang 0.5.23 round them on Blackwell GPUs, and on others only weights are"
        )
        return [f"activations in {kind.upper()}: {engines}; {OF_WEIGHTS_ALONE}"]

    def input_scale(self, linear: str, largest: float) -> dict[str, torch.Tensor]:
        """Maps the largest magnitude to the largest that blocks hold; zeros stay as they are."""
        magnitude = torch.tensor(largest or LARGEST, dtype=torch.float32)
        number = LARGEST / magnitude if self.layout.divides else magnitude / LARGEST
        return {f"{linear}.{self.layout.input_scale}": number.reshape(self._number_shape)}

    def check(self, grid: Floats, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Takes any linear of whole blocks."""
        for linear, (rows, columns) in shapes.items():
            assert columns % grid.group_size == 0, (linear, rows, columns)

    def stored(self, linear: str, shape: tuple[int, int], grid: Floats) -> list[StoredTensor]:
        (rows, columns), layout = shape, self.layout
        tensors = [
            StoredTensor(f"{linear}.{layout.codes}", "U8", (rows, columns // 2)),
            StoredTensor(f"{linear}.{layout.scales}", layout.scale_dtype, (rows, columns // grid.group_size)),
        ]
        numbers = (layout.tensor_scale, layout.input_scale if grid.noted else "")
        return tensors + [StoredTensor(f"{linear}.{one}", "F32", self._number_shape) for one in filter(None, numbers)]

    @property
    def _number_shape(self) -> tuple[int, ...]:
        return (1,) if self.layout.divides else ()

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        layout, scheme = self.layout, weight.grid
        bits_OI = e2m1_bits(weight.codes_OI)
        codes = {f"{linear}.{layout.codes}": bits_OI[:, ::2] | bits_OI[:, 1::2] << 4}
        if isinstance(scheme, Mxfp4):
            exponents_OB = (weight.scales_OG.log2() + EXPONENT_BIAS).round().to(torch.uint8)
            return codes | {f"{linear}.{layout.scales}": exponents_OB}
        assert isinstance(scheme, Nvfp4), scheme
        number = 1 / scheme.tensor_scale if layout.divides else scheme.tensor_scale
        tensor_scale = torch.tensor(number, dtype=torch.float32, device=weight.scales_OG.device)
        return codes | {
            f"{linear}.{layout.scales}": (weight.scales_OG / scheme.tensor_scale).to(torch.float8_e4m3fn),
            f"{linear}.{layout.tensor_scale}": tensor_scale.reshape(self._number_shape),
        }

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Floats) -> QuantizedWeight:
        layout = self.layout
        bytes_ = tensors[f"{linear}.{layout.codes}"]
        codes_OI = codes_of_bits(torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1))
        scales_OB = tensors[f"{linear}.{layout.scales}"].float()
        if isinstance(grid, Nvfp4):
            number = float(tensors[f"{linear}.{layout.tensor_scale}"])
            grid = replace(grid, tensor_scale=1 / number if layout.divides else number)
            scales_OB = scales_OB * grid.tensor_scale
        else:
            scales_OB = torch.exp2(scales_OB - EXPONENT_BIAS)
        return QuantizedWeight(codes_OI, scales_OB, torch.zeros_like(scales_OB, dtype=torch.uint8), grid)


class CompressedFloat4(Float4):
    """A layout of compressed-tensors."""

    holds_fp8 = True
    decoder = COMPRESSED_TENSORS
    tried = "run by vLLM 0.22 on an H200 and by transformers 5.24; SGLang's kernels have not been tried"

    def wrote(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a config group is in this layout."""
        return quantization.get("quant_method") == "compressed-tensors" and any(
            group["format"] == self.layout.name for group in groups_of(quantization)
        )

    def stored_fp8(self, linear: str, shape: tuple[int, int], blocks: Fp8Blocks) -> tuple[StoredTensor, StoredTensor]:
        return blocks_tensors(linear, shape, blocks)

    def rounds_inputs(self, quantization: Mapping[str, Any]) -> bool:
        groups = groups_of(quantization)
        return any(group["format"] == self.layout.name and group.get("input_activations") for group in groups)

    def with_activations(
        self, quantization: dict[str, Any], kind: Activations, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Any]:
        """Adds what compressed-tensors' preset NVFP4 has: scales of blocks as tokens come, under the stored one."""
        groups = {
            name: group | ({"input_activations": self._inputs} if group["format"] == self.layout.name else {})
            for name, group in quantization["config_groups"].items()
        }
        return quantization | {"config_groups": groups}

    def quantization_config(self, grid: Floats, linears: Linears) -> dict[str, Any]:
        """Returns the config that compressed-tensors 0.20 writes for weights only.

        Where linears stay in FP8 blocks, these are what the class `Linear` stands for, and all others are named. The
        layout of the whole is that of what is quantized: SGLang 0.5.23 knows MXFP4 experts by it.
        """
        fp8 = [blocks for blocks in linears.kept.values() if isinstance(blocks, Fp8Blocks)]
        named = {linear: BITS for linear, quantized in linears.quantized.items() if quantized}
        targets = targets_by_width(named, others=False).get(BITS, []) if fp8 else ["Linear"]
        groups = [*([self._group(targets)] if targets else []), *map(blocks_group, fp8[:1])]
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout.name,
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": ignored_modules(linears.taken),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    @property
    def _weights(self) -> dict[str, Any]:
        of_scales = "torch.float8_e4m3fn" if self.layout.tensor_scale else "torch.uint8"
        return {
            "num_bits": BITS,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group" if self.layout.tensor_scale else "group",
            "group_size": self.layout.scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
            "scale_dtype": of_scales,
            "zp_dtype": of_scales,
        }

    @property
    def _inputs(self) -> dict[str, Any]:
        return self._weights | {"dynamic": "local", "observer": "static_minmax"}

    def _group(self, targets: list[str]) -> dict[str, Any]:
        return {
            "targets": targets,
            "weights": self._weights,
            "input_activations": None,
            "output_activations": None,
            "format": self.layout.name,
        }


class CompressedNvfp4(CompressedFloat4):
    """The format `nvfp4`."""

    name = "nvfp4"
    help = "NVFP4 in compressed-tensors' layout"
    activations = ("fp4",)
    layout = NVFP4
    group_sizes = (NVFP4.scheme.group_size,)
    words = "NVFP4"

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        note = (
            "transformers (5.24) decodes a mixture's experts in NVFP4 without the scale of the tensor: do not load it "
            "there"
        )
        return super().engine_notes(widths, mixture, to_choose, symmetric) + [note] * mixture

    def library(self, widths: Collection[int], mixture: bool) -> str | None:
        return None if mixture else super().library(widths, mixture)


class CompressedMxfp4(CompressedFloat4):
    """The format `mxfp4`."""

    name = "mxfp4"
    help = "MXFP4 in compressed-tensors' layout"
    layout = MXFP4
    group_sizes = (MXFP4.scheme.group_size,)
    words = "MXFP4"
    rank = 3


class ModelOptNvfp4(Float4):
    """The format `nvfp4-modelopt`."""

    name = "nvfp4-modelopt"
    help = "NVFP4 in ModelOpt's layout"
    activations = ("fp4",)
    layout = MODELOPT
    group_sizes = (MODELOPT.scheme.group_size,)
    words = "NVFP4 (ModelOpt)"
    tried = "run by vLLM 0.22 on an H200; SGLang's kernels have not been tried"

    def wrote(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a config is of this layout: FP8 of ModelOpt goes by DeepSeek's words."""
        return quantization.get("quant_method") == MODELOPT.name

    def library(self, widths: Collection[int], mixture: bool) -> str | None:
        return "Model Optimizer"

    def quantization_config(self, grid: Floats, linears: Linears) -> dict[str, Any]:
        """Returns the flat form that ModelOpt 0.47 writes to config.json, for weights only: vLLM takes `group_size`
        from its top, and both vLLM and SGLang look for `ignore` as for AWQ's list."""
        return {
            "quant_method": MODELOPT.name,
            "quant_algo": "W4A16_NVFP4",
            "group_size": self.layout.scheme.group_size,
            "config_groups": {"group_0": {"weights": self._numbers, "targets": ["Linear"]}},
            "ignore": skipped_modules(linears.quantized, linears.mtp_layer),
        }

    def rounds_inputs(self, quantization: Mapping[str, Any]) -> bool:
        return quantization.get("quant_algo") == WITH_INPUTS

    def with_activations(
        self, quantization: dict[str, Any], kind: Activations, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Any]:
        """Says it as ModelOpt does, in whose words nothing is dynamic about scales of blocks."""
        ((name, group),) = quantization["config_groups"].items()
        groups = {name: {"input_activations": self._numbers, **group}}
        return quantization | {"quant_algo": WITH_INPUTS, "config_groups": groups}

    @property
    def _numbers(self) -> dict[str, Any]:
        return {"dynamic": False, "num_bits": BITS, "type": "float", "group_size": self.layout.scheme.group_size}
