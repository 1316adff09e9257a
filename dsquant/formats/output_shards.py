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

from dsquant.files.disk import PARTIAL, EarlyWriteback, naming, sync_folder, write_at, write_atomically
from dsquant.files.hashing import OrderedHash
from dsquant.source.shards import DTYPE_NAMES, INDEX_FILE, tensor_bytes

# The data begin at a multiple of this, as the safetensors library has it.
ALIGNMENT = 8
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
        self.path = folder / plan.file_name
        """Its name once it is whole."""
        self._partial = folder / (plan.file_name + PARTIAL)
        self._begins = begins
        header = plan.header
        if begins:
            self._partial.unlink(missing_ok=True)  # a process of an earlier run may still have that one open
            with naming(self.path):
                self._partial.write_bytes(header)
        self._file = self._partial.open("r+b", buffering=0)
        self._early = EarlyWriteback(self._file.fileno())
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._offsets: dict[str, int] = {}
        offset = len(header)
        for tensor in plan.tensors:
            self._offsets[tensor.name] = offset
            offset += tensor.num_bytes
        self._hashes = {name: OrderedHash() for name in self._tensors}

    def write_rows(self, name: str, start_row: int, rows: torch.Tensor, place: int | None = None) -> None:
        """Writes rows of a tensor in the planned dtype, from `start_row` on: of a stack, those of the tensor at
        `place`."""
        rows = rows.detach().cpu()
        self.store_rows(name, start_row, place, rows)
        self.hash_rows(name, start_row, place, rows)

    def store_rows(self, name: str, start_row: int, place: int | None, rows: torch.Tensor) -> None:
        """Writes rows as `write_rows`, but for their hash, which `hash_rows` makes, meanwhile in another thread."""
        start, raw = self._part(name, start_row, place, rows)
        with naming(self.path):
            write_at(self._file.fileno(), raw, self._offsets[name] + start)
        self._early.add(self._offsets[name] + start, len(raw))

    def hash_rows(self, name: str, start_row: int, place: int | None, rows: torch.Tensor) -> None:
        """Hashes rows; of a tensor whose rows come out of order, the whole is read back when the file is whole."""
        self._hashes[name].add(*self._part(name, start_row, place, rows))

    def _part(self, name: str, start_row: int, place: int | None, rows: torch.Tensor) -> tuple[int, memoryview]:
        """Where in the tensor's bytes the rows begin, and the rows' bytes."""
        planned = self._tensors[name]
        shape = planned.shape if place is None else planned.shape[1:]
        assert DTYPE_NAMES[rows.dtype] == planned.dtype, (name, rows.dtype, planned.dtype)
        assert tuple(rows.shape[1:]) == shape[1:], (name, tuple(rows.shape), planned.shape)
        start = (place or 0) * tensor_bytes(planned.dtype, shape) + start_row * tensor_bytes(planned.dtype, shape[1:])
        return start, memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def commit(self) -> dict[str, str]:
        """Brings the whole file to disk and gives it its name; returns tensor -> SHA-256, hexadecimal."""
        return self.publish(self.sync())

    def sync(self) -> Written:
        """Brings the rows that this process has written to disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        self._file.close()
        return {
            name: self._hashes[name].of(tensor.num_bytes) or count
            for name, tensor in self._tensors.items()
            if (count := self._hashes[name].num_bytes) or not tensor.num_bytes
        }

    def publish(self, *written: Written) -> dict[str, str]:
        """Gives the file its name once every process has called `sync`, which returned `written`; returns tensor ->
        SHA-256."""
        assert self._begins, f"{self.path}: another process gives it its name"
        hashes = {}
        for name, tensor in self._tensors.items():
            hashes[name] = self._hash(tensor, [part[name] for part in written if name in part])
        self._partial.replace(self.path)
        sync_folder(self.path.parent)
        return hashes

    def _hash(self, tensor: StoredTensor, parts: Sequence[str | int]) -> str:
        if len(parts) == 1 and isinstance(parts[0], str):
            return parts[0]
        count = sum(part for part in parts if isinstance(part, int))
        assert count == tensor.num_bytes, (
            f"{self.path}: {count} of {tensor.num_bytes} bytes of {tensor.name} are written"
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
