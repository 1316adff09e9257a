"""GGUF files that are planned to the byte before a weight is read, and filled in place.

Every tensor has its offset from the start, so any part can be written at any time; a killed job goes on in the same
file. It carries a temporary name until all of it is there.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.disk import PARTIAL, naming, sync_folder
from dsquant.formats.gguf.types import row_bytes

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
        """Size of its data."""
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
        """Size of the file."""
        return len(self.header) + sum(_padded(tensor.num_bytes) for tensor in self.tensors)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def plan_files(
    stem: str,
    architecture: str,
    add_keys: Callable[[Any], None],
    tensors: Sequence[GgufTensor],
    max_file_bytes: int,
) -> tuple[GgufFile, ...]:
    """Distributes tensors over files and builds their headers; gguf-py does both.

    Args:
        stem: the name of the file without its ending; split files get `-00001-of-00003` behind it.
        architecture: `general.architecture`.
        add_keys: adds every other key to a `gguf.GGUFWriter`.
        tensors: all tensors in order.
        max_file_bytes: the most tensor data in a file, as far as single tensors allow; 0 makes one file.

    Returns:
        The files.
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


class GgufFiles:
    """The planned files on disk, under temporary names, open for writing."""

    def __init__(self, folder: Path, files: Sequence[GgufFile], resume: bool) -> None:
        """Makes the files at their full size, or finds those of an interrupted job.

        Args:
            folder: where they lie.
            files: the plan.
            resume: whether they are there already.

        Raises:
            InputError: where an interrupted job's file is gone or not the planned one.
        """
        self._folder, self._files = folder, files
        self._streams = {file.file_name: self._open(file, resume) for file in files}
        self._place = {name: (file, offset) for file in files for name, offset in file.offsets.items()}
        self._tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
        self._digests: dict[str, Any] = {}
        self._written: dict[str, int] = {}

    def _open(self, file: GgufFile, resume: bool) -> Any:
        path = self._folder / (file.file_name + PARTIAL)
        if resume:
            if not path.is_file():  # stopped when everything was written: while it was compared or hashed
                path = self._folder / file.file_name
            if not path.is_file() or path.stat().st_size != file.num_bytes:
                raise InputError(f"{path} of the interrupted job is gone or damaged; start over with --restart")
            stream = path.open("r+b")
            if stream.read(len(file.header)) != file.header:
                stream.close()
                raise InputError(f"{path} was planned otherwise by the interrupted job; start over with --restart")
            return stream
        stream = path.open("w+b")
        try:
            with naming(path):
                stream.write(file.header)
                stream.truncate(file.num_bytes)
        except OSError:
            stream.detach().close()  # without what could not be written
            raise
        return stream

    def write(self, name: str, start: int, stored: torch.Tensor) -> None:
        """Writes bytes of a tensor, each call where the last one of this tensor ended.

        Args:
            name: the tensor.
            start: the first byte, counted from the tensor's beginning.
            stored: uint8, any shape, contiguous.
        """
        file, offset = self._place[name]
        if start == 0:
            self._digests[name], self._written[name] = hashlib.sha256(), 0
        assert start == self._written[name], f"{name}: byte {start} after {self._written[name]}"
        raw = memoryview(stored.contiguous().view(-1).numpy().data)
        stream = self._streams[file.file_name]
        with naming(self._folder / file.file_name):
            stream.seek(offset + start)
            stream.write(raw)
        self._digests[name].update(raw)
        self._written[name] += len(raw)

    def commit(self, names: Sequence[str]) -> dict[str, str]:
        """Brings tensors to disk.

        Args:
            names: the tensors, all of them wholly written.

        Returns:
            Tensor -> SHA-256 of its bytes, hexadecimal.
        """
        for name in names:
            wanted = self._tensors[name].num_bytes
            assert self._written.get(name) == wanted, f"{name}: {self._written.get(name)} of {wanted} bytes"
        for file_name in {self._place[name][0].file_name for name in names}:
            stream = self._streams[file_name]
            with naming(self._folder / file_name):
                stream.flush()
                os.fsync(stream.fileno())
        return {name: self._digests.pop(name).hexdigest() for name in names}

    def close(self) -> None:
        """Closes the files; what is on disk stays, for a resumed job."""
        for file_name, stream in self._streams.items():
            with naming(self._folder / file_name):
                stream.close()

    def finish(self) -> None:
        """Gives the files their names."""
        self.close()
        for file in self._files:
            path = self._folder / (file.file_name + PARTIAL)
            if path.exists():
                path.replace(self._folder / file.file_name)
        sync_folder(self._folder)
