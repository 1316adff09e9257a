"""Safetensors shards that are planned to the byte before a weight is read, and written tensor by tensor.

A unit (embedding, one layer, head) is the part of a job that is finished and journaled in one go; no shard spans two
units, so an interrupted job never has to continue half a shard. A shard grows under a temporary name and takes its own
only when it is whole and on disk.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsquant.files.disk import PARTIAL, begin_writing, naming, sync_folder, write_at, write_atomically
from dsquant.source.shards import DTYPE_NAMES, INDEX_FILE, tensor_bytes

# The data begin at a multiple of this, as the safetensors library has it.
ALIGNMENT = 8
# So many bytes are written before the disk is told to begin with them.
BEGIN_AT = 64 * 2**20
BYTES_AT_ONCE = 2**22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a shard will hold it."""

    name: str
    dtype: str
    """The safetensors name: I32, BF16 ..."""
    shape: tuple[int, ...]

    @cached_property
    def num_bytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One planned file."""

    file_name: str
    unit: str
    tensors: tuple[StoredTensor, ...]
    metadata: str = "pt"
    """The tensors' layout in the header, for the libraries that ask."""

    @property
    def header(self) -> bytes:
        """The file's first bytes: length and JSON header, padded with spaces."""
        entries: dict[str, Any] = {"__metadata__": {"format": self.metadata}}
        begin = 0
        for tensor in self.tensors:
            end = begin + tensor.num_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            begin = end
        raw = json.dumps(entries, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % ALIGNMENT)
        return struct.pack("<Q", len(raw)) + raw

    @cached_property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ShardPlan:
    """Every file of a checkpoint's weights."""

    shards: tuple[Shard, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def shards_of(self, unit: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.unit == unit)


def plan_shards(
    units: Sequence[tuple[str, Sequence[StoredTensor]]], max_shard_bytes: int, metadata: str = "pt"
) -> ShardPlan:
    """Distributes the tensors of each unit, in the order in which they are made, over files of at most
    `max_shard_bytes` of data; a larger tensor gets a file of its own. The files' names count all shards."""
    parts = [(unit, part) for unit, tensors in units for part in _split(tensors, max_shard_bytes)]
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    shards = (Shard(name, unit, tuple(part), metadata) for name, (unit, part) in zip(names, parts, strict=True))
    return ShardPlan(tuple(shards))


def _split(tensors: Sequence[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    parts: list[list[StoredTensor]] = []
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.num_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.num_bytes
    return parts


Written = dict[str, str | int]
"""Tensor -> SHA-256 of its bytes where one process has written them in order; else how many it has written."""


class ShardFile:
    """A planned shard being written; its tensors may come in any order, each row once.

    A tensor may be a stack of others, which come one by one. Several processes and threads may write into one shard.
    """

    def __init__(self, folder: Path, plan: Shard, begins: bool = True) -> None:
        """Creates the file under its temporary name, or joins the process that has created it; `begins` is that
        process, which also renames the file when it is whole, or removes it when it is given up."""
        self.plan = plan
        self._path = folder / plan.file_name
        self._partial = folder / (plan.file_name + PARTIAL)
        self._begins = begins
        header = plan.header
        if begins:
            self._partial.unlink(missing_ok=True)  # a process of an earlier run may still have that one open
            with naming(self._path):
                self._partial.write_bytes(header)
        self._file = self._partial.open("r+b", buffering=0)
        self._waiting: list[tuple[int, int]] = []
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._offsets: dict[str, int] = {}
        offset = len(header)
        for tensor in plan.tensors:
            self._offsets[tensor.name] = offset
            offset += tensor.num_bytes
        self._bytes_written = dict.fromkeys(self._tensors, 0)
        self._bytes_hashed = dict.fromkeys(self._tensors, 0)
        self._digests = {name: hashlib.sha256() for name in self._tensors}

    def write_rows(self, name: str, start_row: int, rows: torch.Tensor, place: int | None = None) -> None:
        """Writes rows of a tensor in the planned dtype, from `start_row` on: of a stack, those of the tensor at
        `place`."""
        planned = self._tensors[name]
        shape = planned.shape if place is None else planned.shape[1:]
        assert DTYPE_NAMES[rows.dtype] == planned.dtype, (name, rows.dtype, planned.dtype)
        assert tuple(rows.shape[1:]) == shape[1:], (name, tuple(rows.shape), planned.shape)
        raw = memoryview(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        before = (place or 0) * tensor_bytes(planned.dtype, shape) + start_row * tensor_bytes(planned.dtype, shape[1:])
        start = self._offsets[name] + before
        with naming(self._path):
            write_at(self._file.fileno(), raw, start)
        self._let_the_disk_begin(start, len(raw))
        self._bytes_written[name] += len(raw)
        if before == self._bytes_hashed[name]:  # what comes out of order is read back when the file is whole
            self._digests[name].update(raw)
            self._bytes_hashed[name] += len(raw)

    def _let_the_disk_begin(self, start: int, count: int) -> None:
        """Keeps the disk busy all the time, not only at the end."""
        self._waiting.append((start, start + count))
        if sum(end - begin for begin, end in self._waiting) >= BEGIN_AT:
            first, last = min(begin for begin, _ in self._waiting), max(end for _, end in self._waiting)
            begin_writing(self._file.fileno(), first, last - first)
            self._waiting.clear()

    def commit(self) -> dict[str, str]:
        """Brings the whole file to disk and gives it its name; returns tensor -> SHA-256, hexadecimal."""
        return self.publish(self.sync())

    def sync(self) -> Written:
        """Brings the rows that this process has written to disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        self._file.close()
        return {
            name: self._digests[name].hexdigest() if self._bytes_hashed[name] == tensor.num_bytes else count
            for name, tensor in self._tensors.items()
            if (count := self._bytes_written[name]) or not tensor.num_bytes
        }

    def publish(self, *written: Written) -> dict[str, str]:
        """Gives the file its name once every process has called `sync`, which returned `written`; returns tensor ->
        SHA-256."""
        assert self._begins, f"{self._path}: another process gives it its name"
        hashes = {}
        for name, tensor in self._tensors.items():
            hashes[name] = self._hash(tensor, [part[name] for part in written if name in part])
        self._partial.replace(self._path)
        sync_folder(self._path.parent)
        return hashes

    def _hash(self, tensor: StoredTensor, parts: Sequence[str | int]) -> str:
        if len(parts) == 1 and isinstance(parts[0], str):
            return parts[0]
        count = sum(part for part in parts if isinstance(part, int))
        assert count == tensor.num_bytes, (
            f"{self._path}: {count} of {tensor.num_bytes} bytes of {tensor.name} are written"
        )
        digest = hashlib.sha256()
        with self._partial.open("rb") as file:
            file.seek(self._offsets[tensor.name])
            for start in range(0, count, BYTES_AT_ONCE):
                digest.update(file.read(min(BYTES_AT_ONCE, count - start)))
        return digest.hexdigest()

    def discard(self) -> None:
        """Removes the unfinished file; does nothing after `commit`."""
        self._file.close()
        if self._begins:
            self._partial.unlink(missing_ok=True)


def write_index(folder: Path, plan: ShardPlan) -> None:
    write_atomically(folder / INDEX_FILE, index_content(plan))


def index_content(plan: ShardPlan) -> bytes:
    """Returns the content of model.safetensors.index.json."""
    total = sum(tensor.num_bytes for shard in plan.shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.file_name for shard in plan.shards for tensor in shard.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
