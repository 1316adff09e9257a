"""Reads quantized checkpoints as lazy weights: each linear is decoded on access by the package that defines its format.

dsquant's own packer is not used: a mistake in it must not cancel out when the output is judged.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.schemes import Scheme
from dsquant.source.read_ahead import stored_ahead
from dsquant.source.shards import ShardIndex, TensorInfo
from dsquant.source.weights import Weights


def whole_number(
    config: Path, values: Mapping[str, Any], key: str, default: int, allowed: tuple[int, ...] | None
) -> int:
    """Returns a positive integer of config.json, one of those allowed where they are given."""
    found = values.get(key, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1 or (allowed and found not in allowed):
        wanted = f"one of {', '.join(map(str, allowed))}" if allowed else "a positive number"
        raise InputError(f"{config}: quantization_config has {key} {found!r:.40}; expected {wanted}")
    return found


def checked_matrix(index: ShardIndex, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> TensorInfo:
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
    decoder: tuple[str, str] | None
    """The package that decodes it, and the module; None where none is needed."""

    def __init__(self, index: ShardIndex, device: torch.device) -> None:
        """Finds the packed linears; raises InputError where one lacks one of its tensors."""
        self.index = index
        self.device = device
        self._ahead = stored_ahead(index, pinned=device.type == "cuda")
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
        self.names = dict.fromkeys([*(name for name in index if name not in parts), *self._packed])

    @abstractmethod
    def decode(self, prefix: str) -> torch.Tensor:
        """Decodes the linear whose tensors begin with `prefix`, float32 [O, I]."""

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads rows of a weight; a packed one is decoded as a whole."""
        if name in self._packed:
            return self.decode(self._packed[name])[start_row:stop_row]
        whole = start_row == 0 and stop_row is None
        stored = self._ahead.take(name) if whole else self.index.read(name, start_row, stop_row)
        return stored.to(self.device, non_blocking=True).float()

    def prefetch(self, names: Sequence[str]) -> int:
        """Starts to read whole weights, as they are stored, in the background."""
        parts = (stored for name in names if name in self.names for stored in self._stored(name))
        return self._ahead.begin(list(parts))

    def _stored(self, name: str) -> list[str]:
        """Returns the stored tensors that a weight is decoded from."""
        if name not in self._packed:
            return [name]
        return [self._packed[name] + part for part in (self.marker, *self.companions)]

    def _read(self, name: str) -> torch.Tensor:
        """Reads a stored tensor to the device."""
        return self._ahead.take(name).to(self.device, non_blocking=True)

    def _parts(self, prefix: str) -> dict[str, torch.Tensor]:
        return {part: self._read(prefix + part) for part in (self.marker, *self.companions)}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self.index.require(name).shape
        return self.packed_shape(self._packed[name])

    def scheme(self, name: str) -> Scheme | None:
        return self.packed_scheme(self._packed[name]) if name in self._packed else None

    @abstractmethod
    def packed_scheme(self, prefix: str) -> Scheme:
        """Returns the grid of a packed linear."""

    @abstractmethod
    def packed_shape(self, prefix: str) -> tuple[int, int]:
        """Returns [O, I] of a packed linear, from headers."""
