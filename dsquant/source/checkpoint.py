"""Opens a checkpoint: its config, and one lazy mapping from names to float32 weights.

The mapping hides how the weights are stored: FP8 with block scales is dequantized on access (a weight and its scales
may lie in different shards), BF16 is widened, quantized formats are decoded by their own packages.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.foreign import LARGEST_MODEL_TEXT_BYTES, find_file
from dsquant.files.strict_json import read_json_object
from dsquant.kernels.fp8 import dequantize_fp8
from dsquant.schemes import Fp8Blocks
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.look_alikes import advice
from dsquant.source.read_ahead import stored_ahead
from dsquant.source.shards import ShardIndex, TensorInfo
from dsquant.source.weights import CPU, Weights

CONFIG_FILE = "config.json"
FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
FLOATS = ("BF16", "F16", "F32", "F64", FP8)


# Behind the name of a weight that compressed-tensors has packed: the tensors that it is made of.
PACKED_SUFFIX = "_packed"
_PACKED_PARTS = (PACKED_SUFFIX, "_scale", "_shape")


def stored_parts(index: Mapping[str, TensorInfo], parameter: str) -> list[str]:
    """Returns the stored tensors that a parameter is made of: itself and FP8's scales where it has them, or its packed
    parts."""
    suffixes = ("", SCALE_SUFFIX) if parameter in index else _PACKED_PARTS
    return [parameter + suffix for suffix in suffixes if parameter + suffix in index]


def parameters_of(tensors: Collection[str]) -> list[str]:
    """Returns the parameters that stored tensors make, in their order: the reverse of `stored_parts`."""
    found = []
    for name in tensors:
        scaled = name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in tensors
        weight = next((name.removesuffix(part) for part in _PACKED_PARTS if name.endswith(part)), name)
        if weight + PACKED_SUFFIX not in tensors:
            found += [] if scaled else [name]
        elif name == weight + PACKED_SUFFIX:
            found.append(weight)
    return found


class StoredWeights(Weights):
    """name -> float32 tensor of an FP8, BF16, F16 or F32 checkpoint, read on each access and never cached."""

    def __init__(self, index: ShardIndex, block: tuple[int, int] | None, device: torch.device = CPU) -> None:
        """Pairs every FP8 weight with its scales; weights cross the bus to the device as they are stored and are
        widened there.

        `block` is rows and columns of an FP8 block, None where the config names none. Raises InputError where an FP8
        weight has no scales or scales of the wrong shape, or the config names no block.
        """
        self.index = index
        self.block = block
        self.device = device
        self._ahead = stored_ahead(index, pinned=device.type == "cuda")
        scales = {name + SCALE_SUFFIX for name, info in index.items() if info.dtype == FP8}
        self.names = dict.fromkeys(name for name in index if name not in scales)
        for name in self.names:
            if index[name].dtype not in FLOATS and not name.endswith(SCALE_SUFFIX):
                raise InputError(
                    f"{index[name].path}: tensor {index[name].label} has dtype {index[name].dtype}; weights are one of "
                    f"{', '.join(FLOATS)}"
                )
            if index[name].dtype == FP8:
                self._check_scales(index[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the weight's shape."""
        return self.index.require(name).shape

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads some rows of a weight, dequantized."""
        info = self.index.require(name)
        if info.dtype != FP8:
            return self._read(name, start_row, stop_row).float()
        assert self.block is not None
        first_block = start_row // self.block[0]
        skipped = start_row - first_block * self.block[0]  # rows of the first block that were not requested
        weight = self._read(name, start_row - skipped, stop_row)
        last_block = first_block + -(-len(weight) // self.block[0])
        scales = self._read(name + SCALE_SUFFIX, first_block, last_block)
        return dequantize_fp8(weight, scales, self.block)[skipped:]

    def prefetch(self, names: Sequence[str]) -> int:
        """Starts to read whole weights, as they are stored, in the background."""
        parts = (stored for name in names for stored in (name, name + SCALE_SUFFIX))
        return self._ahead.begin([stored for stored in parts if stored in self.index])

    def _read(self, name: str, start_row: int, stop_row: int | None) -> torch.Tensor:
        whole = start_row == 0 and (stop_row is None or stop_row >= self.index[name].shape[0])
        stored = self._ahead.take(name) if whole else self.index.read(name, start_row, stop_row)
        return stored.to(self.device, non_blocking=True)

    def _check_scales(self, info: TensorInfo) -> None:
        if self.block is None:
            raise InputError(
                f"{info.path}: tensor {info.label} is FP8 but {CONFIG_FILE} has no quantization_config with "
                "weight_block_size; take config.json from the same release as the weights"
            )
        scale = self.index.get(info.name + SCALE_SUFFIX)
        if scale is None:
            raise InputError(
                f"{info.path}: FP8 tensor {info.label} has no {info.name + SCALE_SUFFIX!r} in any shard; "
                "the checkpoint is incomplete"
            )
        if scale.dtype not in SCALE_DTYPES:
            raise InputError(
                f"{scale.path}: tensor {scale.label} is {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}"
            )
        blocks = Fp8Blocks(*self.block)
        expected = blocks.scale_shape((info.shape[0], info.shape[1])) if len(info.shape) == 2 else None
        if scale.shape != expected:
            raise InputError(
                f"{scale.path}: tensor {scale.label} has shape {list(scale.shape)}; the weight of shape "
                f"{list(info.shape)} with blocks of {list(self.block)} needs {list(expected or ())}"
            )


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    folder: Path
    config: dict[str, Any]
    """The text model's config.json, corrected to agree with the files."""
    index: ShardIndex
    weights: Weights
    """Original parameter names -> float32."""
    notes: tuple[str, ...] = ()
    """Differences between the files and config.json, in words."""

    @property
    def architecture(self) -> str:
        """The first entry of the config's `architectures`."""
        return str((self.config.get("architectures") or ["(none named)"])[0])


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint folder's config.json; raises InputError where it is missing or not a JSON object."""
    return read_config_file(find_file(folder, CONFIG_FILE) or folder / CONFIG_FILE)


def read_config_file(path: Path) -> dict[str, Any]:
    """Reads a config.json at any place and of any name; as `read_config`."""
    if not path.exists():
        raise InputError(f"{path} is missing: {advice(path.parent, path.name)}")
    then = "take config.json from the same release as the weights"
    return read_json_object(path, then, most_bytes=LARGEST_MODEL_TEXT_BYTES)


def block_size(folder: Path, quantization: dict[str, Any]) -> tuple[int, int] | None:
    """Returns rows and columns of an FP8 block from a quantization_config; None where it names none. Raises InputError
    where they are not two positive numbers, or the FP8 is of a kind that is not supported."""
    for key, known in (("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        if quantization.get("quant_method") == "fp8" and quantization.get(key, known) != known:
            raise InputError(
                f"{folder / CONFIG_FILE}: quantization_config has {key} {quantization[key]!r:.80}, dsquant reads "
                f"only {known!r}; start from the release with block scales, or from BF16"
            )
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise InputError(f"{folder / CONFIG_FILE}: weight_block_size must be two positive numbers, found {block!r}")
    return block[0], block[1]
