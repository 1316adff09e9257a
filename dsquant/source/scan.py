"""Reads a whole checkpoint once before anything is written: every tensor's hash, and no NaN or infinity in it."""

import hashlib
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import torch

from dsquant.errors import InputError
from dsquant.files.sealing import in_threads
from dsquant.source.fp8_blocks import SCALE_SUFFIX
from dsquant.source.shards import ShardIndex, TensorInfo

BYTES_AT_ONCE = 32 * 2**20
# Read of each tensor to compare copies of a checkpoint without reading them whole.
SAMPLE_BYTES = 4096
LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
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
    return not bool(((values.view(integer) & mask) == mask).any())


Look = Callable[[TensorInfo, torch.Tensor], None]
"""Gets a tensor and some of its rows as they are stored, from any thread; may raise."""


def unseen(info: TensorInfo, values: torch.Tensor) -> None:
    """Ignores the rows."""


def scan(
    index: ShardIndex,
    after_tensor: Callable[[str], None],
    tensors: Collection[TensorInfo] | None = None,
    look: Look = unseen,
) -> dict[str, str]:
    """Reads every tensor once, or those given; returns name -> SHA-256 of its stored bytes, hexadecimal.

    `after_tensor` is called with each finished tensor's name, from the calling thread, and may raise to stop; `look`
    gets everything that is read, once it is known to be finite. Raises InputError at the first NaN, infinity or
    impossible FP8 scale, with file and tensor.
    """
    infos = {info.name: info for info in (index.values() if tensors is None else tensors)}
    return in_threads(lambda name: scan_tensor(index, infos[name], look), infos, after_tensor)


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


def scan_tensor(index: ShardIndex, info: TensorInfo, look: Look = unseen) -> str:
    """Reads one tensor, some rows at a time, each given to `look`; returns the SHA-256 of its stored bytes,
    hexadecimal.

    Raises InputError where it holds NaN or infinity, or FP8 scales that are negative or give infinite weights.
    """
    digest = hashlib.sha256()
    num_rows = info.shape[0] if info.shape else 1
    step = max(1, BYTES_AT_ONCE * num_rows // max(1, info.num_bytes))
    of_fp8 = info.name.endswith(SCALE_SUFFIX) and info.name.removesuffix(SCALE_SUFFIX) in index
    for start in range(0, num_rows, step):
        values = index.read(info.name, start, start + step) if info.shape else index.read(info.name)
        if not all_finite(values):
            raise InputError(
                f"{info.path}: tensor {info.label} holds NaN or infinity in rows {start} to "
                f"{min(start + step, num_rows) - 1}; download the file again or ask its publisher"
            )
        if of_fp8:
            _check_scales(info, values.float())
        look(info, values)
        digest.update(memoryview(values.contiguous().view(torch.uint8).flatten().numpy().data))
    return digest.hexdigest()


def _check_scales(info: TensorInfo, scales: torch.Tensor) -> None:
    lowest, highest = float(scales.min()), float(scales.max())
    if lowest < 0 or (LARGEST_FP8 * highest) ** 2 > torch.finfo(torch.float32).max:
        raise InputError(
            f"{info.path}: tensor {info.label} has scales from {lowest:.3g} to {highest:.3g}; FP8 scales are not "
            "negative, and the squares of weights must not overflow; download the file again or ask its publisher"
        )
