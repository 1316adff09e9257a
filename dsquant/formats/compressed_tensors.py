"""compressed-tensors' pack-quantized layout, which vLLM, SGLang and transformers read.

Shape legend: O out features, I in features, G groups along I, B bits of a code.

weight_packed int32 [O, ceil(I * B / 32)] is a dense stream of B-bit codes along I, the first in the lowest bits (a
3-bit code may straddle two words); weight_scale bfloat16 [O, G]; weight_shape int64 [2]; and where the grid is
asymmetric weight_zero_point int32 [ceil(O * B / 32), G], packed along O. (Layout: compressed-tensors 0.20,
`compressors/pack_quantized`.)

Linears that are not quantized may stay in an FP8 release's blocks, as the layout float-quantized has them: weight
float8_e4m3fn [O, I] and weight_scale float32, one for each block. (compressed-tensors 0.20,
`compressors/naive_quantized`.)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dsquant.errors import UsageError
from dsquant.formats.beside_fp8 import FLOAT, blocks_group, blocks_tensors
from dsquant.formats.compressed_tensors_weights import PACKED, CompressedTensorsWeights
from dsquant.formats.float4_weights import FLOATS, groups_of
from dsquant.formats.integer_format import IntegerFormat
from dsquant.formats.output_shards import StoredTensor
from dsquant.formats.protocol import OF_WEIGHTS_ALONE
from dsquant.formats.safetensors import check_columns
from dsquant.formats.safetensors_target import STOCK_WIDTHS
from dsquant.formats.skip_lists import ignored_modules, rows_in_engines, targets_by_width
from dsquant.formats.wanted import NO_CHOICE, Linears, Wanted, Width
from dsquant.kernels.packing import pack_rows, unpack_rows
from dsquant.kernels.values import WORD_BITS
from dsquant.model.structure import linear_groups
from dsquant.presets import Activations
from dsquant.recipes import Recipe
from dsquant.schemes import FP8_WIDTH, KEPT_WIDTHS, Fp8Blocks, Grid, QuantizedWeight
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import CPU

# vLLM's and SGLang's CUTLASS kernels with FP8 activations work on this many columns of experts at a time, and on this
# many rows and columns of other linears (vLLM 0.22, `CutlassW4A8LinearKernel`).
EXPERT_MULTIPLE = 256
MULTIPLE = 128
GROUP_SIZE = 128


class CompressedTensors(IntegerFormat):
    """The format `compressed-tensors`."""

    name = "compressed-tensors"
    help = "pack-quantized, 2 to 8 bits"
    bits = (4, 8, 7, 6, 5, 3, 2)
    holds_fp8 = True
    activations = ("fp8", "int8")
    rank = 0
    decoder = CompressedTensorsWeights.decoder

    def wrote(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether a config.json's groups are of integers, with or without FP8 beside them."""
        return super().wrote(quantization) and all(group["format"] not in FLOATS for group in groups_of(quantization))

    def described(self, quantization: Mapping[str, Any]) -> str:
        groups = quantization["config_groups"].values()
        schemes = [group["weights"] for group in groups if group.get("format") != FLOAT]
        bits, sizes = (
            " and ".join(str(number) for number in dict.fromkeys(weights[key] for weights in schemes))
            for key in ("num_bits", "group_size")
        )
        words = f"compressed-tensors {bits} bits, groups of {sizes}" if schemes else self.name
        return words + ", the rest in FP8 blocks" * (len(schemes) < len(groups))

    def decoded(
        self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU
    ) -> CompressedTensorsWeights:
        return CompressedTensorsWeights(index, quantization, device)

    def default_symmetric(self, mixture: bool) -> bool | None:
        """All engines take it without zero points."""
        return True

    def released(self, wanted: Wanted) -> Mapping[str, Grid]:
        """Takes over what the preset does not round to fewer bits, or leaves alone: MLPs and inputs of attention as a
        whole. Where widths are chosen or activations rounded, the preset's linears get codes of their own."""
        weights, recipe = wanted.checkpoint.weights, wanted.recipe
        if not isinstance(weights, CompressedTensorsWeights):
            return NO_CHOICE
        made = {parameter for parameters in wanted.parameters.values() for parameter in parameters}
        again = recipe.target is not None or recipe.activations is not None
        grids = {linear: grid for linear, grid in weights.grids.items() if f"{linear}.weight" in made}
        fewer = {linear for linear in wanted.linears if again or (linear in grids and grids[linear].bits > recipe.bits)}
        kept = grids.keys() - fewer
        whole = (inside for layer in wanted.skeleton.layers for inside in linear_groups(layer, kept).values())
        found = {linear: grids[linear] for inside in whole for linear in inside}
        if found and recipe.symmetric is False:
            raise UsageError(
                "--asymmetric: the model's own integers have no zero points, and engines take no mixture of both; "
                "leave it out"
            )
        return found

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        odd = [str(width) for width in widths if width not in STOCK_WIDTHS]
        bits = " or ".join(filter(None, (", ".join(odd[:-1]), *odd[-1:])))
        found = f"the target lets linears have {bits} bits" if to_choose else f"linears of {bits} bits"
        few = (
            f"{found}: vLLM 0.33 takes them on NVIDIA GPUs from Turing on (its Humming kernels), transformers decodes "
            "them; SGLang and earlier vLLM take 4 and 8 bits alone"
        )
        return [few] * bool(odd) + [self._of_zero_points(widths, mixture)] * (not symmetric)

    @staticmethod
    def _of_zero_points(widths: Collection[Width], mixture: bool) -> str:
        """Returns which engines take zero points."""
        engines = "vLLM and SGLang take them"
        if not {4, *KEPT_WIDTHS}.issuperset(widths):
            engines = "where linears do not have 4 bits, vLLM 0.33's Humming kernels alone take them"
        elif mixture:
            engines = "vLLM 0.33 and SGLang 0.5.23 take them, earlier versions not in experts"
        return (
            f"zero points in the format compressed-tensors: {engines}, and transformers (5.24) does not load them; for "
            "others leave --asymmetric out"
        )

    def mixed_notes(self, widths: Collection[Width], mixture: bool) -> list[str]:
        bits = " and ".join(str(width) for width in sorted(int(width) for width in widths if width != FP8_WIDTH))
        fp8 = " or stay in FP8" if FP8_WIDTH in widths else ""
        note = (
            f"linears have {bits} bits{fp8}, by the names in config.json, which vLLM and "
            "SGLang follow; transformers (5.24) decodes a mixture's linears as if all were alike: do not load it there"
        )
        return [note] if mixture else []

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        for linear, shape in shapes.items():
            check_columns(linear, shape, grid)

    def activation_notes(self, kind: Activations, mixture: bool, fp8: bool) -> list[str]:
        engines = "vLLM on Hopper" + (", SGLang 0.5.23 only with --rest bf16" if fp8 else ", SGLang 0.5.23")
        if kind == "int8":
            engines = "vLLM on CPUs" + ", experts on Arm alone" * mixture + "; on Hopper vLLM 0.22 rounds them to FP8"
        return [f"activations in {kind.upper()}: {engines}; {OF_WEIGHTS_ALONE}"]

    def rounds_inputs(self, quantization: Mapping[str, Any]) -> bool:
        return any(group["format"] == PACKED and group.get("input_activations") for group in groups_of(quantization))

    def check_activations(self, recipe: Recipe, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        option = f"--activations {recipe.activations}"
        if recipe.target is not None:
            raise UsageError(f"{option}: engines take 4 bits for all linears; leave {recipe.target} out")
        if (grid.bits, grid.group_size, grid.symmetric) != (4, GROUP_SIZE, True):
            found = f"{grid.bits} bits in groups of {grid.group_size}" + ", with zero points" * (not grid.symmetric)
            odd = next((linear for linear, (_, columns) in shapes.items() if columns % GROUP_SIZE), None)
            reason = f" ({odd} has {shapes[odd][1]} columns)" if odd and grid.group_size != GROUP_SIZE else ""
            raise UsageError(
                f"{option}: engines take 4 bits in groups of {GROUP_SIZE} without zero points, this output has "
                f"{found}{reason}"
            )
        for linear, (_, columns) in shapes.items():
            if recipe.activations == "fp8" and ".experts." in linear and columns % EXPERT_MULTIPLE:
                raise UsageError(
                    f"{option}: {linear} has {columns} columns, vLLM takes experts of multiples of {EXPERT_MULTIPLE}"
                )
        if shapes and len(self.unrounded(recipe.activations, shapes)) == len(shapes):
            raise UsageError(f"{option}: no linear has rows and columns in multiples of {MULTIPLE}, as vLLM takes them")

    def unrounded(self, kind: Activations | None, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Returns the linears (name -> [O, I]) whose shape, fused, no kernel with FP8 activations takes: in R1 the
        inputs of attention, whose 2112 rows are no multiple of 128."""
        rows = rows_in_engines(shapes) if kind == "fp8" else {}
        return [linear for linear, height in rows.items() if height % MULTIPLE or shapes[linear][1] % MULTIPLE]

    def with_activations(
        self, quantization: dict[str, Any], kind: Activations, shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Any]:
        """Adds what compressed-tensors' presets W4AFP8 and W4A8 have: tokens are rounded as they come. Linears that
        are `unrounded` are a group of their own."""
        rounded = {
            "num_bits": 8, "type": "float" if kind == "fp8" else "int", "strategy": "token", "symmetric": True,
            "dynamic": True, "observer": None,
        }  # fmt: skip
        apart = dict.fromkeys(self.unrounded(kind, shapes), False)
        named = targets_by_width(dict.fromkeys(shapes, True) | apart, others=False)
        groups: list[dict[str, Any]] = []
        for group in quantization["config_groups"].values():
            if group["format"] != PACKED or group["weights"]["group_size"] != GROUP_SIZE:
                groups.append(group)
                continue
            targets = group["targets"] if group["targets"] == ["Linear"] else named[True]
            groups.append(group | {"targets": targets, "input_activations": rounded})
            groups += [group | {"targets": named[False]}] if apart else []
        return quantization | {"config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}

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

    def stored_fp8(self, linear: str, shape: tuple[int, int], blocks: Fp8Blocks) -> tuple[StoredTensor, StoredTensor]:
        return blocks_tensors(linear, shape, blocks)

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

    def quantization_config(self, grid: Grid, linears: Linears) -> dict[str, Any]:
        """Returns the config that compressed-tensors 0.20 writes for weights only.

        Where linears stay in FP8 blocks, these are what the class `Linear` stands for, and all others are named; those
        that keep the source's integers are named. The layout of the whole is that of what is quantized: SGLang 0.5.23
        refuses experts beside `mixed-precision`.
        """
        widths, kept = linears.widths, linears.kept
        fp8 = [blocks for blocks in kept.values() if isinstance(blocks, Fp8Blocks)]
        size, quantized = grid.group_size, [linear for linear, rounded in linears.quantized.items() if rounded]
        named = dict.fromkeys(quantized, (grid.bits, size)) if fp8 else {}
        named |= {linear: (bits, size) for linear, bits in widths.items()}
        own = {linear: (one.bits, one.group_size) for linear, one in kept.items() if isinstance(one, Grid)}
        named |= {linear: kind for linear, kind in own.items() if widths or fp8 or kind != (grid.bits, size)}
        targets = targets_by_width(named, others=bool(widths) and not fp8) if named else {}
        if not targets or (quantized and not widths and not fp8):
            targets.setdefault((grid.bits, size), []).append("Linear")
        groups = [
            _config_group(replace(grid, bits=bits, group_size=group_size), names)
            for (bits, group_size), names in targets.items()
        ]
        groups += [blocks_group(fp8[0])] if fp8 else []
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": ignored_modules(linears.taken),
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
        "format": PACKED,
    }
