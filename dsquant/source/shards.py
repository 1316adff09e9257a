"""Indexes a safetensors checkpoint from headers alone, and reads single tensors.

The index is checked completely before a weight is read: a run must not find out after hours that shard 140 is
truncated. The reader opens the shard for each read and reads into fresh memory: nothing stays mapped, so resident
memory is only what the caller keeps.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.foreign import LARGEST_MODEL_TEXT_BYTES, LONGEST_NAME_BYTES, find_file, open_file
from dsquant.files.strict_json import parse_json, read_json_object
from dsquant.source.look_alikes import advice

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LFS_POINTER = b"version "
"""How the text begins that Git leaves in place of a large file until it is pulled."""
SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")
# Limits of shapes: far beyond any tensor, and short enough to be multiplied and printed.
MOST_DIMENSIONS = 8
LARGEST_INTEGER = 2**63 - 1


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor's data, from its safetensors dtype and its shape."""
    return DTYPES[dtype].itemsize * math.prod(shape)


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor's bytes."""

    name: str
    dtype: str
    """The safetensors name: F8_E4M3, BF16, F32 ..."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """Offset of the first byte in the file."""
    stored_name: str = ""
    """The name in the file of the tensor, or of the one that it is a part of, where it differs."""

    @property
    def label(self) -> str:
        """The tensor's name for messages."""
        other = self.stored_name if self.stored_name != self.name else ""
        return f"{self.name!r} (in the file {other!r})" if other else repr(self.name)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return tensor_bytes(self.dtype, self.shape)


Watch = Callable[[TensorInfo, int, torch.Tensor], None]
"""Gets a tensor, the byte of it where reading began, and the values as they are stored, in the thread that has read
them; may raise."""


class ShardIndex(Mapping[str, TensorInfo]):
    """name -> TensorInfo of every tensor of a checkpoint folder, and a reader of their data."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensor data read so far, for progress."""
        self.watch: Watch | None = None
        """Gets everything that is read."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data in the checkpoint."""
        return sum(info.num_bytes for info in self.values())

    def require(self, name: str) -> TensorInfo:
        """Returns the tensor's place; raises InputError where the checkpoint has no such tensor."""
        if name not in self._tensors:
            raise InputError(f"{self.folder}: tensor {name!r} is missing; is the checkpoint complete?")
        return self._tensors[name]

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None, pinned: bool = False) -> torch.Tensor:
        """Reads a tensor, or rows start_row..stop_row-1 along dimension 0, in its stored dtype and memory of its own.

        `pinned` reads into page-locked memory. Raises InputError where the tensor is missing or the file has shrunk
        since it was indexed.
        """
        info = self.require(name)
        shape, offset = info.shape, info.start
        if shape and (start_row or stop_row is not None):
            stop_row = shape[0] if stop_row is None else min(stop_row, shape[0])
            row_bytes = info.num_bytes // shape[0] if shape[0] else 0
            offset, shape = offset + start_row * row_bytes, (stop_row - start_row, *shape[1:])
        buffer = torch.empty(tensor_bytes(info.dtype, shape), dtype=torch.uint8, pin_memory=pinned)
        _read_exactly(info, offset, buffer)
        self.bytes_read += buffer.nbytes
        values = buffer.view(DTYPES[info.dtype]).view(shape)
        if self.watch is not None:
            self.watch(info, offset - info.start, values)
        return values


def _read_exactly(info: TensorInfo, offset: int, buffer: torch.Tensor) -> None:
    view = memoryview(buffer.numpy().data)
    with info.path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise InputError(
                    f"{info.path}: the file ends inside tensor {info.label}; it was complete when the run began. "
                    "Restore the file and run again."
                )
            done += count


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of a .safetensors file; raises InputError where the file is not complete."""
    with open_file(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise InputError(
                f"{path}: not a complete safetensors file (it has {size_bytes} bytes, fewer than any header); download "
                "it again"
            )
        if prefix == LFS_POINTER:
            raise InputError(f"{path}: Git LFS's pointer to a file, not the file; run `git lfs pull` in {path.parent}")
        header_bytes = struct.unpack("<Q", prefix)[0]
        if header_bytes > min(size_bytes - 8, LARGEST_MODEL_TEXT_BYTES):
            raise InputError(
                f"{path}: not a complete safetensors file (its header claims {header_bytes} bytes, the file has "
                f"{size_bytes}); download it again"
            )
        raw = file.read(header_bytes)
    header = parse_json(raw, f"{path}: the safetensors header", "download it again")
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + header_bytes, size_bytes) for name, entry in header.items()}
    _check_no_overlap(path, tensors)
    return tensors


def _check_no_overlap(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Refuses tensors that share bytes: a forged or damaged header."""
    for before, after in pairwise(sorted(tensors.values(), key=lambda info: (info.start, info.num_bytes))):
        if before.start + before.num_bytes > after.start:
            raise InputError(
                f"{path}: the bytes of tensor {after.name!r} overlap those of {before.name!r}; the file is damaged"
            )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size_bytes: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), _integers(entry["shape"], MOST_DIMENSIONS)
        begin, end = _integers(entry["data_offsets"], 2)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header entry of tensor {name!r} is malformed: {entry!r:.200}") from error
    if dtype not in DTYPES:
        raise InputError(f"{path}: tensor {name!r} has dtype {dtype:.40}; known are {', '.join(DTYPES)}")
    if any(extent < 0 for extent in shape) or begin < 0 or end - begin != tensor_bytes(dtype, shape):
        raise InputError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {tensor_bytes(dtype, shape)} "
            f"bytes, its header gives the range {begin}..{end}; the file is damaged"
        )
    if data_start + end > size_bytes:
        raise InputError(
            f"{path}: truncated: tensor {name!r} ends at byte {data_start + end}, the file has {size_bytes}; "
            "download it again"
        )
    return TensorInfo(name, dtype, shape, path, data_start + begin)


def _integers(numbers: Any, most: int) -> tuple[int, ...]:
    if not isinstance(numbers, list) or len(numbers) > most:
        raise TypeError(f"not a list of at most {most} integers")
    if not all(type(number) is int and abs(number) <= LARGEST_INTEGER for number in numbers):
        raise ValueError("not integers of 64 bits")
    return tuple(numbers)


def read_index(folder: Path) -> ShardIndex:
    """Indexes a checkpoint folder from its index file and every shard's header, or from one model.safetensors.

    The index has every tensor that the index file names, from the shard it names, and the others in those shards.
    Raises InputError where a file is missing, truncated, or contradicts the index, where a path leaves the folder, or
    where two shards hold the same tensor.
    """
    index_path = find_file(folder, INDEX_FILE)
    if index_path is None:
        single = find_file(folder, SINGLE_FILE)
        if single is None:
            raise InputError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} is there: {advice(folder, INDEX_FILE)}")
        return ShardIndex(folder, read_header(single))
    weight_map = _read_weight_map(index_path)
    headers = {
        file_name: read_header(_shard_path(folder, index_path, file_name))
        for file_name in sorted(set(weight_map.values()))
    }
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise InputError(
                f"{index_path}: tensor {name!r} should be in {file_name}, whose header does not have it; "
                "the index and the shard are from different releases"
            )
    tensors = {name: headers[file_name][name] for name, file_name in weight_map.items()}
    for info in (info for header in headers.values() for info in header.values()):
        found = tensors.setdefault(info.name, info)  # engines load whole shards, unlisted tensors included
        if found is not info:
            raise InputError(
                f"{index_path}: tensor {info.name!r} is in {found.path.name} and in {info.path.name}; remove one of "
                "them"
            )
    return ShardIndex(folder, tensors)


def _read_weight_map(index_path: Path) -> dict[str, str]:
    index = read_json_object(index_path, "download it again", most_bytes=LARGEST_MODEL_TEXT_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index_path}: 'weight_map' must map tensor names to file names")
    if not weight_map:
        raise InputError(f"{index_path}: 'weight_map' is empty")
    return weight_map


def _shard_path(folder: Path, index_path: Path, file_name: str) -> Path:
    if not SHARD_NAME.fullmatch(file_name) or len(file_name.encode()) > LONGEST_NAME_BYTES:
        raise InputError(
            f"{index_path}: {file_name!r:.300} is not the name of a .safetensors file in the same folder; refused"
        )
    path = find_file(folder, file_name)
    if path is None:
        raise InputError(f"{folder / file_name}: the shard in {index_path.name} is missing; download it again")
    return path
