"""Every tensor's hash, and no NaN or infinity in it: of a whole checkpoint, or of what a job reads anyway."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

from dsquant.errors import InputError
from dsquant.files.hashing import OrderedHash
from dsquant.files.sealing import in_threads
from dsquant.kernels.fp8 import LARGEST_FP8
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.shards import ShardIndex, TensorInfo

BYTES_AT_ONCE = 32 * 2**20
# Values in so many bytes are looked at together, a linear of an expert of R1. Where they stay in a core's cache it is
# an eighth faster, but a thread that launches a GPU's work would have to wait for Python hundreds of times.
LOOKED_AT_BYTES = 2**24
# Read of each tensor to compare copies of a checkpoint without reading them whole.
SAMPLE_BYTES = 4096
# The exponent bits that are all ones in NaN and infinity (in NaN alone for e4m3fn, which has no infinity).
_INTEGER_VIEWS = {
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
    torch.float8_e5m2: (torch.uint8, 0x7C),
    torch.float8_e8m0fnu: (torch.uint8, 0xFF),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}


def all_finite(values: torch.Tensor) -> bool:
    """Returns whether a tensor has no NaN and no infinity, by its bits: without a copy, and without converting FP8."""
    if values.dtype not in _INTEGER_VIEWS:
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    integer, mask = _INTEGER_VIEWS[values.dtype]
    parts = values.contiguous().view(-1).view(integer).split(LOOKED_AT_BYTES // values.itemsize)
    return not any(int((part & mask).max()) == mask for part in parts if len(part))  # `any` takes ten times as long


def scan(
    index: ShardIndex, after_tensor: Callable[[str], None], names: Collection[str] | None = None
) -> dict[str, str]:
    """Reads every tensor once, or those named; returns name -> SHA-256 of its stored bytes, hexadecimal.

    `after_tensor` is called with each finished tensor's name, from the calling thread, and may raise to stop. Raises
    InputError at the first NaN, infinity or impossible FP8 scale, with file and tensor.
    """
    return in_threads(lambda name: scan_tensor(index, index[name]), index if names is None else names, after_tensor)


class SourceHashes:
    """Hashes the tensors of a checkpoint while a job reads them for the first time, and checks what is read.

    A tensor that is read in parts is hashed as far as these come in order.
    """

    def __init__(self, index: ShardIndex, known: Mapping[str, str]) -> None:
        """Watches what is read through an index, but for the tensors whose hashes are `known`."""
        self.found = dict(known)
        """Tensor -> SHA-256 of its stored bytes, hexadecimal."""
        self._index = index
        self._lock = Lock()
        self._begun: dict[str, OrderedHash] = {}
        self._at_work: set[str] = set()
        index.watch = self._watch

    def rest(self, names: Collection[str], after_tensor: Callable[[str], None]) -> None:
        """Reads and hashes what is missing of some tensors; as `scan`."""
        missing = [name for name in names if name not in self.found]
        with self._lock:
            self._at_work.update(missing)
        self.found |= scan(self._index, after_tensor, missing)

    def _watch(self, info: TensorInfo, start: int, values: torch.Tensor) -> None:
        """Gets what has been read of a tensor, from its byte `start` on."""
        with self._lock:
            hashed = self._begun.setdefault(info.name, OrderedHash())
            new = start <= hashed.num_bytes < start + values.nbytes
            if not new or info.name in self.found or info.name in self._at_work:
                return
            self._at_work.add(info.name)
        try:
            check_values(self._index, info, values, start)
            hashed.add(hashed.num_bytes, _raw(values)[hashed.num_bytes - start :])
        finally:
            with self._lock:
                self._at_work.remove(info.name)
        if digest := hashed.of(info.num_bytes):
            self.found[info.name] = digest
            del self._begun[info.name]


def sampled_hash(index: ShardIndex) -> str:
    """Hashes enough to distinguish two copies of a checkpoint without reading them whole.

    Returns the SHA-256 of every tensor's name, dtype, shape and `SAMPLE_BYTES` from the middle of its data,
    hexadecimal.
    """

    def sample(info: TensorInfo) -> bytes:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.start + max(0, info.num_bytes - SAMPLE_BYTES) // 2)
            data = file.read(min(SAMPLE_BYTES, info.num_bytes))
        return f"{info.name} {info.dtype} {info.shape} ".encode() + hashlib.sha256(data).digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(sample, (index[name] for name in sorted(index))):
            digest.update(found)
    return digest.hexdigest()


def scan_tensor(index: ShardIndex, info: TensorInfo) -> str:
    """Reads one tensor, some rows at a time; returns the SHA-256 of its stored bytes, hexadecimal. Raises InputError as
    `check_values`."""
    digest = hashlib.sha256()
    num_rows = info.shape[0] if info.shape else 1
    step = max(1, BYTES_AT_ONCE * num_rows // max(1, info.num_bytes))
    for start in range(0, num_rows, step):
        values = index.read(info.name, start, start + step) if info.shape else index.read(info.name)
        check_values(index, info, values, start * info.num_bytes // num_rows)
        digest.update(_raw(values))
    return digest.hexdigest()


def check_values(index: ShardIndex, info: TensorInfo, values: torch.Tensor, start: int) -> None:
    """Raises InputError where values of a tensor, from its byte `start` on, hold NaN or infinity, or are FP8 scales
    that are negative or give infinite weights."""
    if not all_finite(values):
        first = start * info.shape[0] // info.num_bytes if info.shape else 0
        raise InputError(
            f"{info.path}: tensor {info.label} holds NaN or infinity in rows {first} to "
            f"{first + (len(values) if info.shape else 1) - 1}; download the file again or ask its publisher"
        )
    if info.name.endswith(SCALE_SUFFIX) and info.name.removesuffix(SCALE_SUFFIX) in index:
        _check_scales(info, values.float())


def _raw(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).flatten().numpy().data)


def _check_scales(info: TensorInfo, scales: torch.Tensor) -> None:
    lowest, highest = float(scales.min()), float(scales.max())
    if lowest < 0 or (LARGEST_FP8 * highest) ** 2 > torch.finfo(torch.float32).max:
        raise InputError(
            f"{info.path}: tensor {info.label} has scales from {lowest:.3g} to {highest:.3g}; FP8 scales are not "
            "negative, and the squares of weights must not overflow; download the file again or ask its publisher"
        )
