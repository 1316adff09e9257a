"""GGUF files that are planned to the byte before a weight is read, and filled in place.

Every tensor has its offset from the start, so any part can be written at any time; a killed job continues in the same
file. It carries a temporary name until all of it is there.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.disk import PARTIAL, EarlyWriteback, naming, sync_folder, write_at
from dsquant.files.hashing import OrderedHash
from dsquant.formats.gguf.shared_hashes import SharedHashes
from dsquant.formats.gguf.types import row_bytes
from dsquant.formats.protocol import Surroundings

ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file will hold it."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    """Columns last; the file's own header lists them first."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """One planned file."""

    file_name: str
    header: bytes
    """Keys and tensor infos, padded to where the data begin."""
    tensors: tuple[GgufTensor, ...]

    @property
    def offsets(self) -> dict[str, int]:
        """Tensor -> where its data begin in the file."""
        offsets, offset = {}, len(self.header)
        for tensor in self.tensors:
            offsets[tensor.name] = offset
            offset += _padded(tensor.num_bytes)
        return offsets

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(_padded(tensor.num_bytes) for tensor in self.tensors)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def plan_files(
    stem: str, architecture: str, add_keys: Callable[[Any], None], tensors: Sequence[GgufTensor], max_file_bytes: int
) -> tuple[GgufFile, ...]:
    """Distributes tensors over files and builds their headers; gguf-py does both.

    `stem` is the file name without its ending; split files get `-00001-of-00003` behind it. `add_keys` adds every key
    but `general.architecture` to a `gguf.GGUFWriter`. A file holds at most `max_file_bytes` of tensor data, as far as
    single tensors allow; 0 makes one file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    with tempfile.TemporaryDirectory(prefix="dsquant-") as folder, naming(Path(folder)):
        writer = GGUFWriter(Path(folder) / f"{stem}.gguf", architecture, split_max_size=max_file_bytes)
        add_keys(writer)
        for tensor in tensors:
            raw = GGMLQuantizationType[tensor.type_name]
            writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        names = [[str(name) for name in part] for part in writer.tensors]
        paths = writer.format_shard_names(writer.path)
        writer.close()
        headers = [path.read_bytes() for path in paths]
    by_name = {tensor.name: tensor for tensor in tensors}
    return tuple(
        GgufFile(path.name, header + b"\0" * (-len(header) % ALIGNMENT), tuple(by_name[name] for name in part))
        for path, header, part in zip(paths, headers, names, strict=True)
    )


class OpenGgufFiles:
    """The planned files on disk, under temporary names, open for writing.

    Several ranks may write into them, each whole rows of matrices. Where one rank writes all of a tensor in its order,
    its hash is made of what is written, else of the file.
    """

    def __init__(self, folder: Path, files: Sequence[GgufFile], resume: bool, surroundings: Surroundings) -> None:
        """Creates the files at their full size, or with `resume` opens those of an interrupted job; all ranks open
        them.

        Raises InputError where an interrupted job's file is missing or not the planned one.
        """
        self._folder, self._files, self._surroundings = folder, files, surroundings
        ranks = surroundings.ranks
        if not resume:
            ranks.once(self._make)
        self._opened = ranks.together(lambda: {file.file_name: self._open(file) for file in files})
        self._place = {name: (file, offset) for file in files for name, offset in file.offsets.items()}
        self._tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        self._early = {name: EarlyWriteback(stream.fileno()) for name, stream in self._opened.items()}
        self._hashes: dict[str, OrderedHash] = {}
        places = {
            name: (self._opened[file.file_name], offset, self._tensors[name].num_bytes)
            for name, (file, offset) in self._place.items()
        }
        self._shared = SharedHashes(ranks, surroundings.work, places)

    def _make(self) -> None:
        self._folder.mkdir(exist_ok=True)
        for file in self._files:
            path = self._folder / (file.file_name + PARTIAL)
            path.unlink(missing_ok=True)  # a process of an earlier job may still have that one open
            with naming(path), path.open("xb", buffering=0) as stream:
                write_at(stream.fileno(), memoryview(file.header), 0)
                stream.truncate(file.num_bytes)
            self._surroundings.written(path, 0, len(file.header), file.file_name)

    def _path(self, file: GgufFile) -> Path:
        """Where a file is now."""
        path = self._folder / (file.file_name + PARTIAL)
        # It has its name where the job was stopped when everything was written: while it was compared or hashed.
        return path if path.is_file() else self._folder / file.file_name

    def _open(self, file: GgufFile) -> FileIO:
        path = self._path(file)
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            raise InputError(f"{path} of the interrupted job is gone or damaged; start over with --restart")
        stream = path.open("r+b", buffering=0)
        if os.pread(stream.fileno(), len(file.header), 0) != file.header:
            stream.close()
            raise InputError(f"{path} was planned otherwise by the interrupted job; start over with --restart")
        return stream

    def store(self, name: str, start: int, stored: torch.Tensor) -> None:
        """Writes bytes of a tensor, uint8 of any shape, from byte `start` of the tensor on; each byte once.

        Their hash is made by `hash`, meanwhile in another thread.
        """
        file, offset = self._place[name]
        raw = _bytes(stored)
        with naming(self._folder / file.file_name):
            write_at(self._opened[file.file_name].fileno(), raw, offset + start)
        self._early[file.file_name].add(offset + start, len(raw))
        if self._surroundings.ranks.size == 1:
            self._tell_written(name, start, start + len(raw))
        else:
            self._shared.written(name, offset + start, offset + start + len(raw))

    def hash(self, name: str, start: int, stored: torch.Tensor) -> None:
        """Takes the same bytes into the tensor's hash."""
        self._hashes.setdefault(name, OrderedHash()).add(start, _bytes(stored))

    def _tell_written(self, name: str, start: int, stop: int) -> None:
        """Tells of bytes of a tensor, and of the padding behind its last."""
        file, offset = self._place[name]
        path, size = self._path(file), self._tensors[name].num_bytes
        stop = stop if stop < size else _padded(size)
        self._surroundings.written(path, offset + start, offset + stop, file.file_name)

    def commit(self, names: Sequence[str]) -> dict[str, str]:
        """Brings tensors that all ranks together have written to disk; returns tensor -> SHA-256, hexadecimal, on every
        rank."""
        for file_name in {self._place[name][0].file_name for name in names}:
            with naming(self._folder / file_name):
                os.fsync(self._opened[file_name].fileno())
        ranks, sizes = self._surroundings.ranks, {name: self._tensors[name].num_bytes for name in names}
        made = {name: self._hashes.pop(name, OrderedHash()) for name in names}
        found = ranks.gather({name: (one.num_bytes, one.of(sizes[name])) for name, one in made.items()})
        for name, wanted in sizes.items():
            written = sum(part[name][0] for part in found)
            assert written == wanted, f"{name}: {written} of {wanted} bytes"
            if ranks.size > 1:
                self._tell_written(name, 0, wanted)
        whole = {name: digest for part in found for name, (_, digest) in part.items() if digest}
        return whole | self._shared.of([name for name in names if name not in whole])

    def close(self) -> None:
        self._shared.close()
        for stream in self._opened.values():
            stream.close()

    def finish(self) -> None:
        """Gives the files their names."""
        self.close()
        for file in self._files:
            path = self._folder / (file.file_name + PARTIAL)
            if path.exists():
                path.replace(self._folder / file.file_name)
        sync_folder(self._folder)


def _bytes(stored: torch.Tensor) -> memoryview:
    return memoryview(stored.contiguous().view(-1).numpy().data)
