"""Opens GGUF files of anyone's making: header and directory are walked before gguf-py reads them.

gguf-py believes every count: an array of 10^12 bytes in a file of 100 keeps it busy for days. Reference: the layout in
ggml's docs/gguf.md.
"""

import mmap
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.foreign import open_file
from dsquant.packages import load

# Beyond every model: vocabularies and merges are at most some hundred thousand texts.
MOST_VALUES = 2**22
MOST_DIMENSIONS = 4
LARGEST_EXTENT = 2**40
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_LENGTH, _KIND = struct.Struct("<Q"), struct.Struct("<I")


def read_gguf(path: Path) -> Any:
    """Opens a file with gguf-py's reader; raises InputError where it is missing or damaged, or claims what no file
    holds."""
    reader_of = load("gguf", "gguf").GGUFReader
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                _Walk(raw).header()
            reader = reader_of(path)
            _check_places(reader.tensors, size)
        except Exception as error:  # struct, mmap and gguf-py raise of many kinds on damaged files
            raise InputError(
                f"{path} is damaged or no GGUF file: header and tensors do not fit its {size} bytes ({error}); "
                "fetch or make it again"
            ) from error
    return reader


def _check_places(tensors: Any, size: int) -> None:
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

    def header(self) -> None:
        magic, version = self._raw[:4], self._number(_KIND, 4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}")
        tensors, keys = self._number(_LENGTH), self._number(_LENGTH)
        for _ in range(keys):
            self._string()
            self._value(self._number(_KIND))
        for _ in range(tensors):
            self._count(1)
            self._string()
            dimensions = self._number(_KIND)
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            for _ in range(dimensions):
                extent = self._number(_LENGTH)
                if not 1 <= extent <= LARGEST_EXTENT:
                    raise ValueError(f"a tensor with an extent of {extent}")
            self._step(_KIND.size + _LENGTH.size)

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

    def _string(self) -> None:
        self._step(self._number(_LENGTH))

    def _value(self, kind: int) -> None:
        self._count(1)
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inside, count = self._number(_KIND), self._number(_LENGTH)
            if inside == _ARRAY:
                raise ValueError("an array of arrays")
            self._count(count)
            if inside == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._step(_SIZES[inside] * count)
        else:
            self._step(_SIZES[kind])
