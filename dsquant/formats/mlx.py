"""MLX's affine layout, which mlx-lm reads on Apple silicon.

Shape legend: E experts, O out features, I in features, G groups along I, B bits of a code.

weight uint32 [O, I * B / 32] is a dense stream of B-bit codes along I, the first in the lowest bits; scales and biases
bfloat16 [O, G], and a weight is code * scale + bias. A layer's routed experts lie in one tensor, [E, O, ...], under
`switch_mlp`. kv_b_proj stays as it is: mlx-lm transposes its keys, so groups would not run along their columns.
(Layout: mlx 0.32, `mx.dequantize`; mlx-lm 0.32, `models/switch_layers` and `models/deepseek_v3`.)
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError, UsageError
from dsquant.formats.decoded import DecodedWeights, checked_matrix, whole_number
from dsquant.formats.integer_format import IntegerFormat
from dsquant.formats.output_shards import StoredTensor
from dsquant.formats.safetensors import check_columns
from dsquant.formats.wanted import Linears, Wanted, Width
from dsquant.kernels.packing import pack_rows, unpack_rows
from dsquant.kernels.values import WORD_BITS
from dsquant.model.structure import absorbed_linears
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.checkpoint import CONFIG_FILE
from dsquant.source.shards import ShardIndex, TensorInfo
from dsquant.source.weights import CPU

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.(\d+)\.(.+)")
_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.)switch_mlp\.(.+)")
# The default first.
BITS = (4, 8, 6, 5, 3, 2)
GROUP_SIZES = (16, 32, 64, 128)
ROWS_AT_ONCE = 1024
# Models of mlx-lm 0.32 that read neither rope_scaling nor tie_word_embeddings, by their `model_type`.
UNSCALED = ("glm4_moe",)
# Its model whose config has to state these, and of which every layer has an indexer of its own.
INDEXED = "glm_moe_dsa"


class MlxWeights(DecodedWeights):
    """MLX's affine layout, decoded bit by bit in PyTorch: mlx itself runs on few machines."""

    marker = "scales"
    companions = ("weight", "biases")
    decoder = None

    def __init__(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> None:
        """Reads bits and group sizes from config.json's `quantization`.

        Raises InputError where the config is not of this layout, or tensors contradict it.
        """
        config = index.folder / CONFIG_FILE
        if quantization.get("mode", "affine") != "affine":
            raise InputError(f"{config}: mlx mode {quantization['mode']!r:.40} is not supported, only 'affine' is")
        super().__init__(ShardIndex(index.folder, {info.name: info for info in _unstacked(index)}), device)
        self._group_sizes = {prefix: self._check(config, quantization, prefix) for prefix in self._packed.values()}

    def _check(self, config: Path, quantization: Mapping[str, Any], prefix: str) -> int:
        """Returns a packed linear's group size, after checking its tensors against it."""
        stored = self.index[prefix + self.marker].stored_name or prefix + self.marker
        entry = quantization.get(stored.removesuffix(f".{self.marker}"), quantization)
        if not isinstance(entry, dict):
            raise InputError(f"{config}: {stored!r} is there, but the config has {entry!r:.40} for its module")
        group_size = whole_number(config, entry, "group_size", 64, GROUP_SIZES)
        bits = whole_number(config, entry, "bits", 4, BITS)
        rows, groups = checked_matrix(self.index, prefix + self.marker, ("BF16", "F16", "F32"), None).shape
        checked_matrix(self.index, prefix + "biases", ("BF16", "F16", "F32"), (rows, groups))
        words = groups * group_size * bits // WORD_BITS
        checked_matrix(self.index, prefix + "weight", ("U32",), (rows, words))
        return group_size

    def packed_shape(self, prefix: str) -> tuple[int, int]:
        rows, groups = self.index[prefix + self.marker].shape
        return rows, groups * self._group_sizes[prefix]

    def packed_scheme(self, prefix: str) -> Grid:
        columns = self.packed_shape(prefix)[1]
        bits = self.index[prefix + "weight"].shape[1] * WORD_BITS // columns
        return Grid(bits, self._group_sizes[prefix], symmetric=True)  # as dsquant writes it

    def decode(self, prefix: str) -> torch.Tensor:
        """Computes code * scale + bias, in float32."""
        scales_OG, words, biases_OG = self._parts(prefix).values()
        columns = self.packed_shape(prefix)[1]
        bits = words.shape[1] * WORD_BITS // columns
        places_B = torch.arange(bits, dtype=torch.uint8, device=self.device)
        rows = []
        for start in range(0, len(words), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            bytes_ = words[part].contiguous().view(torch.uint8).unsqueeze(-1)
            stream = bytes_ >> torch.arange(8, dtype=torch.uint8, device=self.device) & 1
            codes_OI = (stream.view(len(bytes_), columns, bits) << places_B).sum(-1)
            codes_OGS = codes_OI.float().unflatten(1, (scales_OG.shape[1], -1))
            scales, biases = (values[part].float().unsqueeze(-1) for values in (scales_OG, biases_OG))
            rows.append((codes_OGS * scales + biases).flatten(1))
        return torch.cat(rows)


def _unstacked(index: ShardIndex) -> Iterator[TensorInfo]:
    """Lists each expert's tensors as ranges of those that hold all experts; any other tensor as it is."""
    for info in index.values():
        match = _STACK.fullmatch(info.name)
        if match is None:
            yield info
            continue
        if len(info.shape) != 3:
            raise InputError(f"{info.path}: tensor {info.label} has shape {list(info.shape)}; expected [experts, ...]")
        part = replace(info, shape=info.shape[1:], stored_name=info.stored_name or info.name)
        for place in range(info.shape[0]):
            name = f"{match[1]}experts.{place}.{match[2]}"
            yield replace(part, name=name, start=info.start + place * part.num_bytes)


class Mlx(IntegerFormat):
    """The format `mlx`."""

    name = "mlx"
    help = "MLX affine, 2 to 6 or 8 bits, for mlx-lm on Apple silicon"
    bits = BITS
    placement = "unified"
    keeps_mtp = False
    metadata = "mlx"
    config_keys = ("quantization", "quantization_config")

    def wrote(self, quantization: Mapping[str, Any]) -> bool:
        """Returns whether bits and group size stand without a method."""
        return "quant_method" not in quantization and {"bits", "group_size"} <= quantization.keys()

    def described(self, quantization: Mapping[str, Any]) -> str:
        entries: list[Mapping[str, Any]] = [entry for entry in quantization.values() if isinstance(entry, dict)]
        bits = " and ".join(
            str(width) for width in sorted({int(entry.get("bits", 4)) for entry in entries or [quantization]})
        )
        return f"MLX {bits} bits, groups of {quantization['group_size']}"

    def decoded(self, index: ShardIndex, quantization: Mapping[str, Any], device: torch.device = CPU) -> MlxWeights:
        return MlxWeights(index, quantization, device)

    def library(self, widths: Collection[int], mixture: bool) -> str | None:
        return "mlx"

    def serve_command(self, location: Path | str) -> str:
        return f"mlx_lm.server --model {location}"

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        return ["the format mlx has been read by mlx-lm 0.32.2 on a CPU, not on an Apple GPU"]

    def default_symmetric(self, mixture: bool) -> bool | None:
        """Biases hold the zero points of symmetric grids only."""
        return True

    def quantizable(self, wanted: Wanted) -> frozenset[str]:
        """Returns the preset's linears without kv_b_proj."""
        return wanted.linears - absorbed_linears(wanted.layers)

    def engines_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns rope_theta, rope_scaling and partial_rotary_factor, which most of mlx-lm's models read only there."""
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {key: rope[key] for key in rope if key != "rope_theta"}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        stated = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
        if config.get("model_type") in UNSCALED and (kind != "default" or config.get("tie_word_embeddings")):
            raise UsageError(
                f"--to mlx: mlx-lm's {config['model_type']} has neither rope scaling ({kind}) nor a head tied to the "
                "embedding; take another format"
            )
        if config.get("model_type") == INDEXED:
            if "shared" in (config.get("indexer_types") or ()):
                raise UsageError(
                    f"--to mlx: mlx-lm's {INDEXED} has an indexer in every layer, and this model has layers that share "
                    "one; take another format"
                )
            theta = {"rope_theta": stated.get("rope_theta", config.get("rope_theta"))}
            stated |= {"moe_layer_freq": 1, "rope_parameters": scaling | theta | {"rope_type": kind}}
        return stated | {"rope_scaling": None if kind == "default" else scaling | {"type": kind, "rope_type": kind}}

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        if grid.bits not in BITS:
            raise UsageError(f"the mlx format has no weights of {grid.bits} bits; use --to compressed-tensors")
        if not grid.symmetric:
            raise UsageError(
                "the mlx format stores -scale * zero point in BF16, which holds it exactly for symmetric grids alone; "
                "leave --asymmetric out"
            )
        for linear, shape in shapes.items():
            check_columns(linear, shape, grid)

    def stack_of(self, tensor: str) -> tuple[str, int] | None:
        """Stacks each linear of a layer's routed experts."""
        match = _EXPERT.fullmatch(tensor)
        return (f"{match[1]}switch_mlp.{match[3]}", int(match[2])) if match else None

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        rows, columns = shape
        groups = columns // grid.group_size
        return [
            StoredTensor(f"{linear}.weight", "U32", (rows, columns * grid.bits // WORD_BITS)),
            StoredTensor(f"{linear}.scales", "BF16", (rows, groups)),
            StoredTensor(f"{linear}.biases", "BF16", (rows, groups)),
        ]

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packs codes, scales and biases, the weights that a code of 0 stands for."""
        return {
            f"{linear}.weight": pack_rows(weight.codes_OI, weight.grid.bits).view(torch.uint32),
            f"{linear}.scales": weight.scales_OG.to(torch.bfloat16),
            f"{linear}.biases": (-weight.grid.levels.middle * weight.scales_OG).to(torch.bfloat16),
        }

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        scales_OG = tensors[f"{linear}.scales"].float()
        columns = scales_OG.shape[1] * grid.group_size
        codes_OI = unpack_rows(tensors[f"{linear}.weight"].view(torch.int32), columns, grid.bits)
        return QuantizedWeight(codes_OI, scales_OG, torch.full(scales_OG.shape, grid.middle, dtype=torch.uint8), grid)

    def quantization_config(self, grid: Grid, linears: Linears) -> dict[str, Any]:
        """Returns mlx-lm's config; a module whose bits were chosen has them under its name."""
        stacks = (((self.stack_of(linear) or (linear, 0))[0], bits) for linear, bits in linears.widths.items())
        chosen = {module: {"group_size": grid.group_size, "bits": bits} for module, bits in stacks}
        return {"group_size": grid.group_size, "bits": grid.bits, "mode": "affine", **chosen}
