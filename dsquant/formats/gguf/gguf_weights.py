"""A GGUF file as lazy weights under the checkpoint's names, decoded by gguf-py."""

import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsquant.errors import InputError
from dsquant.files.foreign import find_file
from dsquant.formats.gguf.file import read_gguf
from dsquant.formats.gguf.layout import Placement, decode_rotary, join_keys_and_values, placements, stored_shape
from dsquant.formats.gguf.types import FLOAT_TYPES, scale_beside
from dsquant.kernels.activation_rounding import Rounding, rounding_of_type
from dsquant.model.families import FAMILIES, family_of
from dsquant.model.overlays import on_device
from dsquant.model.skeleton import network_config
from dsquant.schemes import Scheme
from dsquant.schemes.ggml_types import GGML_TYPES
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.read_ahead import ReadAhead
from dsquant.source.weights import Weights

# Pages of a file that may stay mapped: many times a tensor's, few compared with an evaluation's memory.
RELEASE_BYTES = 64 * 2**20
# That decode ahead, where somebody wants it.
MOST_THREADS = 16
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufWeights(Weights):
    """name -> float32 tensor; a table's rows and one expert's part are decoded on their own."""

    def __init__(self, path: Path, names: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
        """Opens a file, or all parts of a split one from its first, for the original's parameters -> shape; those that
        the file does not hold are left out.

        Raises InputError where a file is missing or damaged, or of another architecture than the original's config.
        """
        self._tensors: dict[str, Any] = {}
        self._maps: list[mmap.mmap] = []
        self._touched = 0
        self._config = config
        threads = min(MOST_THREADS, os.cpu_count() or 1)
        self._ahead = ReadAhead(self._decoded, lambda name: 4 * math.prod(self._shapes[name]), threads)
        architecture = str(config["architectures"][0])
        for part in gguf_parts(path):
            self._read_header(part, FAMILIES[architecture].gguf.architecture)
        found = {name: placements(name, architecture) for name in names}
        self._placements = {
            name: places
            for name, places in found.items()
            if places and all(place.tensor in self._tensors for place in places)
        }
        self.names = self._placements
        self._shapes = {name: names[name] for name in self._placements}
        for name, shape in self._shapes.items():
            self._check_shape(path, name, shape)

    def _read_header(self, path: Path, architecture: str) -> None:
        if not path.exists():
            raise InputError(f"{path} is missing; all parts of a split file must lie in one folder")
        reader = read_gguf(path)
        found = reader.keys.get("general.architecture")
        if found is not None and found != architecture:
            raise InputError(f"{path}: architecture {found!r}, the reference is {architecture!r}; not the same model")
        self._tensors |= {tensor.name: tensor for tensor in reader.tensors}
        self._maps.append(reader.raw)

    def _check_shape(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        for place in self._placements[name]:
            stored = tuple(int(extent) for extent in reversed(self._tensors[place.tensor].shape))
            wanted = stored_shape(shape, place, self._config)
            if stored != wanted:
                raise InputError(
                    f"{path}: tensor {place.tensor!r} has shape {list(stored)}, the reference's {name!r} needs "
                    f"{list(wanted)}; not the same model"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def prefetch(self, names: Sequence[str]) -> int:
        """Starts to decode whole weights in the background, which takes a core many times as long as reading them."""
        return self._ahead.begin([name for name in names if name in self.names])

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        return (
            self._ahead.take(name) if start_row == 0 and stop_row is None else self._decoded(name, start_row, stop_row)
        )

    def _decoded(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        places = self._placements[name]
        if places[0].transform == "keys":
            parts = [self._decode(place) for place in places]
            return join_keys_and_values(parts[0], parts[1])[start_row:stop_row]
        if places[0].transform == "rotary":
            return decode_rotary(self._decode(places[0]), name, self._config)[start_row:stop_row]
        return self._decode(places[0], start_row, stop_row)

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        """Returns the rounding of activations in llama.cpp's CPU kernels for the type that a parameter is stored in."""
        from gguf import GGML_QUANT_SIZES

        kind = self._tensors[self._placements[name][int(values)].tensor].tensor_type
        return rounding_of_type(kind.name, GGML_QUANT_SIZES[kind][0])

    def scheme(self, name: str) -> Scheme | None:
        kind = self._tensors[self._placements[name][-1].tensor].tensor_type.name
        return None if kind in FLOAT_TYPES else GGML_TYPES[kind]

    def _decode(self, place: Placement, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[place.tensor]
        stored = tensor.data if place.expert is None else tensor.data[place.expert]
        stored = np.ascontiguousarray(stored[start_row:stop_row])
        decoded = torch.from_numpy(np.array(dequantize(stored, tensor.tensor_type), dtype=np.float32))
        scale = self._tensors.get(scale_beside(place.tensor, tensor.tensor_type.name) or "")
        if scale is not None:
            decoded *= float(scale.data[place.expert or 0])
        self._release(stored.nbytes)
        return decoded

    def _release(self, num_bytes: int) -> None:
        """Hands back the pages of the files from time to time: they would count as this process's memory."""
        self._touched += num_bytes
        if self._touched > RELEASE_BYTES:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def gguf_file(path: Path) -> Path | None:
    """Returns the GGUF file that a path means, itself, or the only (or first split) one of a folder, if there is one;
    raises InputError where a folder holds several models."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = [file for file in sorted(path.glob("*.gguf")) if not file.name.startswith("imatrix")]
    firsts = [file for file in files if not (match := _SPLIT.fullmatch(file.name)) or int(match[2]) == 1]
    if len(firsts) > 1:
        raise InputError(f"{path} holds several GGUF models ({', '.join(file.name for file in firsts)}); name one file")
    for file in files:
        find_file(path, file.name)
    return firsts[0] if firsts else None


def gguf_parts(path: Path) -> list[Path]:
    """Returns the files of a model: the file itself, or all of a split one, which carry their number in their names."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    return [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def open_gguf(file: Path, original: Checkpoint) -> Weights:
    """Opens the weights of a GGUF file, or of a split one from its first part, under the names of the checkpoint that
    it was made from and on its device; they are decoded on access."""
    shapes = {name: original.weights.shape(name) for name in original.weights}
    network = network_config(family_of(original.folder, original.config), original.config)
    return on_device(GgufWeights(file, shapes, {**original.config, **network}), original.weights.device)
