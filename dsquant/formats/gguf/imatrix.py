"""Importance matrices as llama.cpp keeps them: sums of squared inputs for each tensor, one row for each expert.

Two formats are read, GGUF (written since 2025) and the older `.dat`; GGUF is written, so that `llama-quantize` takes
dsquant's calibration too. Reference: tools/imatrix/imatrix.cpp and `load_imatrix` in tools/quantize/quantize.cpp.

Shape legend: M matrices of a tensor (experts, or heads), I columns.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.files.disk import PARTIAL, naming, publish
from dsquant.files.foreign import open_file, read_file
from dsquant.formats.gguf.file import read_gguf
from dsquant.formats.gguf.files import GgufTensor

# An expert's own statistic counts against its layer's as this many tokens of the layer.
PRIOR_TOKENS = 32
# No column counts less than this share of its tensor's mean: ggml would make blocks of nothing but zeros.
LEAST_SHARE = 1e-4
# The older format counts chunks; a chunk is at least this many tokens.
LEGACY_CHUNK_TOKENS = 512
# Behind one count; so many tokens' means are far from the smallest float32.
MOST_TOKENS = 2**40
LARGEST_LEGACY_BYTES = 2**31
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class TensorImportance:
    sums_MI: torch.Tensor
    """float32 [M, I], sums of squared inputs."""
    counts_M: torch.Tensor
    """float32 [M], tokens behind them."""


def column_importance(entry: TensorImportance) -> torch.Tensor:
    """Returns the weights of a quantizer, float32 [M, I], positive: means, shrunk towards the tensor's where tokens are
    few; all ones without any token."""
    counts_M1 = entry.counts_M.unsqueeze(1)
    total = float(entry.counts_M.sum())
    if total == 0:
        return torch.ones_like(entry.sums_MI)
    pooled_I = entry.sums_MI.sum(0) / total
    means_MI = (entry.sums_MI + PRIOR_TOKENS * pooled_I) / (counts_M1 + PRIOR_TOKENS)
    if len(entry.counts_M) == 1:
        means_MI = entry.sums_MI / counts_M1
    mean = float(means_MI.mean())
    return means_MI.clamp(min=LEAST_SHARE * mean) if mean > 0 else torch.ones_like(means_MI)


def write_imatrix(
    path: Path, entries: Mapping[str, TensorImportance], datasets: list[str], chunks: int, chunk_tokens: int
) -> None:
    """Writes tensor -> importance as an imatrix file that `llama-quantize --imatrix` accepts; `chunks` counts
    samples."""
    from gguf import GGUFWriter

    partial = path.with_name(path.name + PARTIAL)
    writer = GGUFWriter(partial, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name, entry in entries.items():
        writer.add_tensor(name + _SUMS, entry.sums_MI.numpy())
        writer.add_tensor(name + _COUNTS, entry.counts_M.unsqueeze(1).numpy())
    with naming(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    publish(partial, path)


def stored_tensors(path: Path) -> dict[str, list[Any]]:
    """Lists an imatrix file of the newer format: tensor -> type, SHA-256 of its bytes and extents, columns last."""
    return {
        tensor.name: [
            tensor.tensor_type.name,
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
            *(int(extent) for extent in reversed(tensor.shape)),
        ]
        for tensor in read_gguf(path).tensors
    }


def read_imatrix(path: Path) -> dict[str, TensorImportance]:
    """Reads tensor -> importance from an imatrix file of either format. Sums of an older file are flat: M is 1 until
    `fitting_imatrix` knows the tensor. Raises InputError where it is missing, damaged, or not an imatrix."""
    if not path.exists():
        raise InputError(f"{path}: no such imatrix file")
    try:
        with open_file(path) as file:
            is_gguf = file.read(4) == b"GGUF"
        entries = _read_gguf(path) if is_gguf else _read_legacy(read_file(path, LARGEST_LEGACY_BYTES))
    except (InputError, ImportError):
        raise
    except Exception as error:  # gguf-py lets numpy's errors through on damaged files
        raise InputError(f"{path} is damaged or no imatrix: {error}") from error
    if not entries:
        raise InputError(f"{path} holds no importance of any tensor")
    for name, entry in entries.items():
        if not bool(entry.sums_MI.isfinite().all()) or bool((entry.sums_MI < 0).any()):
            raise InputError(f"{path}: the importance of {name!r} has values that are negative or not finite")
        counted_M = (entry.counts_M == 0) | ((entry.counts_M >= 1) & (entry.counts_M <= MOST_TOKENS))
        if not bool(counted_M.all()):
            raise InputError(f"{path}: the counts of {name!r} are negative or not finite, or no numbers of tokens")
    return entries


def _read_gguf(path: Path) -> dict[str, TensorImportance]:
    tensors = {tensor.name: torch.tensor(tensor.data).float() for tensor in read_gguf(path).tensors}
    entries = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            stem = name.removesuffix(_SUMS)
            if stem + _COUNTS not in tensors:
                raise InputError(f"{path}: {name!r} has no {stem + _COUNTS!r}")
            counts_M = tensors[stem + _COUNTS].flatten()
            if sums.numel() % max(1, len(counts_M)):
                raise InputError(f"{path}: {name!r} has {sums.numel()} values for {len(counts_M)} matrices")
            entries[stem] = TensorImportance(sums.reshape(len(counts_M), -1), counts_M)
    return entries


def _read_legacy(raw: bytes) -> dict[str, TensorImportance]:
    """Reads the older format: a count of entries; for each name, calls and values. Values are means times calls."""
    place = 0

    def number() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<i", raw, place - 4)[0])

    entries = {}
    for _ in range(number()):
        length = number()
        if not 0 < length < 1024:
            raise ValueError(f"a tensor name of {length} bytes")
        name = raw[place : place + length].decode()
        place += length
        calls, values = number(), number()
        if values <= 0 or place + 4 * values > len(raw):
            raise ValueError(f"{name!r} has {values} values, the file ends before")
        sums = torch.frombuffer(bytearray(raw[place : place + 4 * values]), dtype=torch.float32)
        place += 4 * values
        counts_M = torch.tensor([float(max(1, calls) * LEGACY_CHUNK_TOKENS)])
        entries[name] = TensorImportance(sums.unsqueeze(0) * LEGACY_CHUNK_TOKENS, counts_M)
    return entries


def fitting_imatrix(path: Path, tensors: Mapping[str, GgufTensor]) -> tuple[dict[str, TensorImportance], list[str]]:
    """Reads an importance matrix for a model's tensors, and makes notes on it for the user; raises InputError where the
    file is damaged or of another model."""
    entries = read_imatrix(path)
    unknown = [name for name in entries if name not in tensors]
    if len(unknown) * 2 > len(entries):
        raise InputError(
            f"{path}: {len(unknown)} of its {len(entries)} tensors, such as {unknown[0]!r}, are not in this model; the "
            "imatrix is of another one"
        )
    found = {
        name: _fitted(path, name, tensors[name].shape, entry) for name, entry in entries.items() if name in tensors
    }
    quantized = [name for name, tensor in tensors.items() if len(tensor.shape) > 1 and tensor.type_name != "F32"]
    covered = sum(name in found for name in quantized)
    starved = sum(int((entry.counts_M == 0).sum()) for entry in found.values())
    notes = [f"the imatrix covers {covered} of {len(quantized)} tensors; the others weigh all columns alike"]
    if starved:
        notes.append(f"{starved} experts' matrices have no token in the imatrix; they take their tensor's mean")
    return found, notes


def _fitted(path: Path, name: str, shape: tuple[int, ...], entry: TensorImportance) -> TensorImportance:
    """Reshapes an entry to M = the tensor's matrices, whose shape has columns last.

    Its sums are multiplied by the power of two that brings the largest to between 0.5 and 1: quantizers choose the
    same, and none of their sums of products overflows.
    """
    matrices = shape[0] if len(shape) == 3 else 1
    if entry.sums_MI.numel() != matrices * shape[-1]:
        raise InputError(
            f"{path}: the importance of {name!r} has {entry.sums_MI.numel()} values, this model's tensor of shape "
            f"{list(shape)} needs {matrices * shape[-1]}; the imatrix is of another model"
        )
    counts_M = entry.counts_M if len(entry.counts_M) == matrices else entry.counts_M[:1].expand(matrices)
    exponent = torch.frexp(entry.sums_MI.max()).exponent
    sums_MI = torch.ldexp(entry.sums_MI.double(), -exponent).float()
    return TensorImportance(sums_MI.reshape(matrices, shape[-1]), counts_M.clone())
