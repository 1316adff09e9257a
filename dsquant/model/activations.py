"""Hidden states of all samples, in a file: what bounds memory when a million tokens pass a layer.

Those that a GPU made are kept in bfloat16, as DeepSeek's own inference keeps them; sums over experts are float32.

Shape legend: N samples, T tokens of a sample, H hidden size, R rows (tokens of all samples, numbered through).
"""

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dsquant.files.disk import begin_writing, naming, reserve, write_at
from dsquant.source.weights import CPU

if TYPE_CHECKING:
    from dsquant.model.passed_on import PassedOn

# Pages touched by this many bytes of access are handed back: resident memory stays small, the page cache keeps them.
RELEASE_BYTES = 256 * 2**20
# Hidden states are saved by so many bytes at once, in page-locked memory.
SAVED_AT_ONCE = 2**25


def stored_dtype(device: torch.device) -> torch.dtype:
    """Returns the type in which hidden states are stored between layers that run on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Activations:
    """An array [N, T, H] in memory, on a GPU or in a memory-mapped file, read and written as float32 on a device.

    In memory it may hold neighbouring samples only; samples and rows (tokens of all samples) keep their numbers.
    """

    def __init__(
        self,
        values_NTH: torch.Tensor,
        mapped: mmap.mmap | None = None,
        device: torch.device | None = None,
        path: Path | None = None,
        first_sample: int = 0,
    ) -> None:
        """Wraps float32 or bfloat16 [N, T, H], changed in place by the setters, with the mapping of its file, if any.

        Reads go to `device`; None is where the array is. The array's first sample has the number `first_sample`.
        """
        self.shape = (values_NTH.shape[0], values_NTH.shape[1], values_NTH.shape[2])
        self.device = device or values_NTH.device
        self._values_NTH = values_NTH
        self._values_RH = values_NTH.view(-1, values_NTH.shape[2])
        self._map, self.path = mapped, path
        self._first_sample, self._first_row = first_sample, first_sample * values_NTH.shape[1]
        self._touched = 0
        self.passed_on: PassedOn | None = None
        """What the file will hold, or whose place in memory this array takes."""
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple[int, int], Future[torch.Tensor]] = {}

    @classmethod
    def in_file(
        cls, path: Path, shape: tuple[int, int, int], device: torch.device = CPU, dtype: torch.dtype | None = None
    ) -> "Activations":
        """Opens a file of activations [N, T, H], filled with zeros where it is new; `dtype` None is `stored_dtype`."""
        opened = cls.being_written(path, shape, device, dtype)
        with naming(path), path.open("r+b") as file:
            reserve(file.fileno(), opened._values_NTH.nbytes)
        return opened

    @classmethod
    def being_written(
        cls, path: Path, shape: tuple[int, int, int], device: torch.device = CPU, dtype: torch.dtype | None = None
    ) -> "Activations":
        """Opens the same to read what a thread writes meanwhile, for which the disk is not asked for room: the file
        system would have the caller wait for the thread."""
        dtype = dtype or stored_dtype(device)
        num_bytes = dtype.itemsize * shape[0] * shape[1] * shape[2]
        with naming(path), path.open("ab") as file:
            file.truncate(num_bytes)
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), num_bytes)
        return cls(torch.frombuffer(mapped, dtype=dtype).view(shape), mapped, device, path)

    @classmethod
    def passing(cls, path: Path | None, shape: tuple[int, int, int], device: torch.device) -> "Activations":
        """Opens float32 activations [N, T, H] in a new file, or with None in the memory of the device."""
        if path is None:
            return cls(torch.zeros(shape, device=device))
        return cls.in_file(path, shape, device, torch.float32)

    @property
    def num_rows(self) -> int:
        """Tokens of all samples."""
        return self._values_RH.shape[0]

    @property
    def in_a_file(self) -> bool:
        """Whether a file is behind it."""
        return self._map is not None

    def stored(self, start: int, stop: int) -> torch.Tensor:
        """Returns samples start..stop-1 themselves, as they are stored."""
        assert start >= self._first_sample, (start, self._first_sample)
        return self._values_NTH[start - self._first_sample : stop - self._first_sample]

    def prefetch(self, start: int, stop: int) -> None:
        """Begins to read samples that a GPU wants next, into page-locked memory; elsewhere does nothing."""
        if self._map is None or self.device.type != "cuda" or start >= stop:
            return
        if self.passed_on is not None and self.passed_on.holds(start):
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="dsquant-hidden")
        self._ahead[start, stop] = self._pool.submit(self._pinned, start, stop)

    def _pinned(self, start: int, stop: int) -> torch.Tensor:
        part_NTH = self.stored(start, stop)
        pinned_NTH = torch.empty(part_NTH.shape, dtype=part_NTH.dtype, pin_memory=True)
        assert self.path is not None
        with self.path.open("rb", buffering=0) as file:  # a mapping would fault once for every page
            file.seek(start * part_NTH[0].nbytes)
            unread = memoryview(pinned_NTH.view(-1).view(torch.uint8).numpy().data)
            while count := file.readinto(unread):
                unread = unread[count:]
        assert not unread, f"{self.path}: {len(unread)} bytes are missing"
        return pinned_NTH

    def samples(self, start: int, stop: int) -> torch.Tensor:
        """Returns a copy of samples start..stop-1, [stop - start, T, H]."""
        if self._map is not None and self.passed_on is not None:
            found_NTH = self.passed_on.samples(start, stop)
            if found_NTH is not None:
                return found_NTH
        begun = self._ahead.pop((start, stop), None)
        if begun is not None:
            return self._handed_out(begun.result().to(self.device, non_blocking=True))
        return self._handed_out(self.stored(start, stop).to(self.device, copy=True))

    def set_samples(self, start: int, values_NTH: torch.Tensor) -> None:
        """Stores samples from number `start` on."""
        self.stored(start, start + len(values_NTH)).copy_(self._as_stored(values_NTH))
        self._release(values_NTH)

    def rows(self, rows_R: torch.Tensor) -> torch.Tensor:
        """Returns a copy of the given tokens, [R, H]."""
        return self._handed_out(self._values_RH[self._local(rows_R)])

    def set_rows(self, rows_R: torch.Tensor, values_RH: torch.Tensor) -> None:
        """Stores the given tokens."""
        self._values_RH[self._local(rows_R)] = self._as_stored(values_RH)
        self._release(values_RH)

    def add_rows(self, rows_R: torch.Tensor, values_RH: torch.Tensor) -> None:
        """Adds to the given tokens, each of which occurs once."""
        self._values_RH[self._local(rows_R)] += self._as_stored(values_RH)
        self._release(values_RH)

    def recorder(self, first_row: int = 0) -> Callable[[torch.Tensor], None]:
        """Returns a function that stores each call's rows [r, H] behind those of the calls before."""
        next_row = first_row - self._first_row

        def record(values_RH: torch.Tensor) -> None:
            nonlocal next_row
            if self.passed_on is not None:
                self.passed_on.take(-(-(next_row + len(values_RH)) // self.shape[1]))
            self._values_RH[next_row : next_row + len(values_RH)] = self._as_stored(values_RH)
            next_row += len(values_RH)
            self._release(values_RH)

        return record

    def save(self, path: Path, samples: tuple[int, int], after_part: Callable[[int], None] = lambda stop: None) -> None:
        """Writes samples (first, end) to their place in a file that `in_file` opens, and does not wait for the disk.

        `after_part` is called with the number of the sample that comes next.
        """
        dtype, (begin, end) = stored_dtype(self.device), samples
        sample_bytes = dtype.itemsize * self.shape[1] * self.shape[2]
        at_once = max(1, SAVED_AT_ONCE // sample_bytes)
        path.touch()
        with naming(path), path.open("r+b", buffering=0) as file:
            for start in range(begin, end, at_once):
                stored_NTH = self.stored(start, min(start + at_once, end))
                # a GPU's copies change no type: a host would convert what it gets, and that takes twenty times as long
                part_NTH = stored_NTH.to(dtype)
                if part_NTH.is_cuda:
                    part_NTH = torch.empty(part_NTH.shape, dtype=dtype, pin_memory=True).copy_(part_NTH)
                self._release(stored_NTH)
                raw = memoryview(part_NTH.view(-1).view(torch.uint8).numpy().data)
                write_at(file.fileno(), raw, start * sample_bytes)
                begin_writing(file.fileno(), start * sample_bytes, len(raw))
                after_part(min(start + at_once, end))

    def flush(self) -> None:
        """Writes everything to disk; after it a kill loses nothing of the file."""
        if self._map is not None:
            self._map.flush()

    def _local(self, rows_R: torch.Tensor) -> torch.Tensor:
        return (rows_R - self._first_row).to(self._values_RH.device)

    def _as_stored(self, values: torch.Tensor) -> torch.Tensor:
        """Values in the array's type and place; a type is changed where they come from, which a GPU does fast."""
        return values.to(self._values_RH.dtype).to(self._values_RH.device)

    def _handed_out(self, values: torch.Tensor) -> torch.Tensor:
        self._release(values)
        return values.to(self.device).float()

    def _release(self, values: torch.Tensor) -> None:
        self._touched += values.nbytes
        if self._map is not None and self._touched > RELEASE_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
