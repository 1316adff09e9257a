"""Reads headers of GGUF files of anyone's making; every step stays in the file.

gguf-py's reader believes every count (an array of 10^12 bytes in a file of 100 keeps it busy for days), and makes an
array of each text: a vocabulary of 50,000 takes it ten seconds, this a tenth of one. Reference: the layout in ggml's
docs/gguf.md.
"""

import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dsquant.errors import InputError
from dsquant.files.foreign import open_file
from dsquant.packages import load

# Beyond every model: vocabularies and merges are at most some hundred thousand texts.
MOST_VALUES = 2**22
MOST_DIMENSIONS = 4
LARGEST_EXTENT = 2**40
ALIGNMENT_KEY, ALIGNMENT, LARGEST_ALIGNMENT = "general.alignment", 32, 2**20
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_LENGTH, _KIND = struct.Struct("<Q"), struct.Struct("<I")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file."""

    name: str
    tensor_type: Any
    """gguf-py's GGMLQuantizationType."""
    shape: tuple[int, ...]
    """In ggml's order, columns first."""
    data_offset: int
    """In the file."""
    n_bytes: int
    raw: mmap.mmap

    @property
    def data(self) -> np.ndarray:
        """The stored numbers, rows first, as they lie in the file; bytes of rows where the type is of blocks."""
        from gguf.quants import quant_shape_to_byte_shape

        rows_first = self.shape[::-1]
        dtype = _DTYPES.get(self.tensor_type.name)
        if dtype is None:
            dtype, rows_first = "u1", quant_shape_to_byte_shape(rows_first, self.tensor_type)
        return np.frombuffer(self.raw, dtype, prod(rows_first), self.data_offset).reshape(rows_first)


_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class GgufFile:
    """The header of a file."""

    keys: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    raw: mmap.mmap


def read_gguf(path: Path) -> GgufFile:
    """Opens a file; raises InputError where it is missing or damaged, or claims what no file holds."""
    load("gguf", "gguf")
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = _Walk(raw).header()
            _check_places(found.tensors, size)
        except Exception as error:  # struct, mmap and gguf-py raise of many kinds on damaged files
            raise InputError(
                f"{path} is damaged or no GGUF file: header and tensors do not fit its {size} bytes ({error}); "
                "fetch or make it again"
            ) from error
    return found


def _check_places(tensors: Iterable[GgufTensor], size: int) -> None:
    """Refuses tensors that end after the file, or share bytes with another."""
    placed = sorted(tensors, key=lambda tensor: (tensor.data_offset, tensor.n_bytes))
    for tensor in placed:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ValueError(f"tensor {tensor.name!r} ends behind the file")
    for before, after in pairwise(placed):
        if before.data_offset + before.n_bytes > after.data_offset:
            raise ValueError(f"the bytes of {after.name!r} overlap those of {before.name!r}")


class _Walk:
    """Goes once over a header; every step stays in the file, so that counts are bounded by its size."""

    def __init__(self, raw: mmap.mmap) -> None:
        self._raw = raw
        self._place = 0
        self._values = 0

    def header(self) -> GgufFile:
        magic, version = self._raw[:4], self._number(_KIND, 4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        num_tensors, num_keys = self._number(_LENGTH), self._number(_LENGTH)
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self._string()
            if name in keys:
                raise ValueError(f"two keys {name!r}")
            keys[name] = self._value(self._number(_KIND))
        found = [self._tensor() for _ in range(num_tensors)]
        if len({name for name, *_ in found}) < len(found):
            raise ValueError("two tensors of one name")
        alignment = keys.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= LARGEST_ALIGNMENT:
            raise ValueError(f"{ALIGNMENT_KEY} {alignment!r}")
        start = -(-self._place // alignment) * alignment
        return GgufFile(keys, tuple(self._placed(start, *one) for one in found), self._raw)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, number of its type, and offset behind the header."""
        self._count(1)
        name, dimensions = self._string(), self._number(_KIND)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self._number(_LENGTH) for _ in range(dimensions))
        wrong = next((extent for extent in shape if not 1 <= extent <= LARGEST_EXTENT), None)
        if wrong is not None:
            raise ValueError(f"a tensor with an extent of {wrong}")
        return name, shape, self._number(_KIND), self._number(_LENGTH)

    def _placed(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found = GGMLQuantizationType(kind)
        block, num_bytes = GGML_QUANT_SIZES[found]
        if shape[0] % block:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]}, {found.name} has blocks of {block}")
        return GgufTensor(name, found, shape, start + offset, prod(shape) // block * num_bytes, self._raw)

    def _number(self, layout: struct.Struct, place: int | None = None) -> int:
        if place is not None:
            self._place = place
        found = int(layout.unpack_from(self._raw, self._place)[0])
        self._step(layout.size)
        return found

    def _step(self, num_bytes: int) -> None:
        self._place += num_bytes
        if self._place > len(self._raw):
            raise ValueError("the file ends in its header")

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values in the header")

    def _string(self) -> str:
        length = self._number(_LENGTH)
        self._step(length)
        return self._raw[self._place - length : self._place].decode()

    def _value(self, kind: int) -> Any:
        self._count(1)
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0]
        inside, count = self._number(_KIND), self._number(_LENGTH)
        if inside == _ARRAY:
            raise ValueError("an array of arrays")
        self._count(count)
        return [self._string() for _ in range(count)] if inside == _STRING else self._numbers(inside, count)

    def _numbers(self, kind: int, count: int) -> list[Any]:
        dtype, first = np.dtype(_NUMBERS[kind]), self._place
        self._step(dtype.itemsize * count)
        return np.frombuffer(self._raw, dtype, count, first).tolist()
