"""Hidden states of all samples, in a file: what bounds memory when a million tokens pass a layer.

Shape legend: N samples, T tokens of a sample, H hidden size, R rows (tokens of all samples, numbered through).
"""

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# Pages touched by this many bytes of access are handed back: resident memory stays small, the page cache keeps them.
RELEASE_BYTES = 256 * 2**20


class Activations:
    """A float32 array [N, T, H], in memory or in a memory-mapped file."""

    def __init__(self, values_NTH: torch.Tensor, mapped: mmap.mmap | None = None) -> None:
        """Wraps an array.

        Args:
            values_NTH: float32 [N, T, H]; changed in place by the setters.
            mapped: the file mapping behind it, if there is one.
        """
        self.shape = (values_NTH.shape[0], values_NTH.shape[1], values_NTH.shape[2])
        self._values_NTH = values_NTH
        self._values_RH = values_NTH.view(-1, values_NTH.shape[2])
        self._map = mapped
        self._touched = 0

    @classmethod
    def in_file(cls, path: Path, shape: tuple[int, int, int]) -> "Activations":
        """Opens a file of activations, which is made (filled with zeros) where it does not exist.

        Args:
            path: the file.
            shape: samples, tokens of a sample, hidden size.

        Returns:
            The activations.
        """
        num_bytes = 4 * shape[0] * shape[1] * shape[2]
        with path.open("ab") as file:
            file.truncate(num_bytes)
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), num_bytes)
        return cls(torch.from_numpy(np.frombuffer(mapped, dtype=np.float32)).view(shape), mapped)

    @property
    def num_rows(self) -> int:
        """Tokens of all samples."""
        return self._values_RH.shape[0]

    def samples(self, start: int, stop: int) -> torch.Tensor:
        """A copy of samples start..stop-1, [stop - start, T, H]."""
        values = self._values_NTH[start:stop].clone()
        self._release(values)
        return values

    def set_samples(self, start: int, values_NTH: torch.Tensor) -> None:
        """Stores samples from number `start` on."""
        self._values_NTH[start : start + len(values_NTH)] = values_NTH
        self._release(values_NTH)

    def rows(self, rows_R: torch.Tensor) -> torch.Tensor:
        """A copy of the given tokens, [R, H]."""
        values = self._values_RH[rows_R]
        self._release(values)
        return values

    def set_rows(self, rows_R: torch.Tensor, values_RH: torch.Tensor) -> None:
        """Stores the given tokens."""
        self._values_RH[rows_R] = values_RH
        self._release(values_RH)

    def add_rows(self, rows_R: torch.Tensor, values_RH: torch.Tensor) -> None:
        """Adds to the given tokens, each of which occurs once."""
        self._values_RH[rows_R] += values_RH
        self._release(values_RH)

    def recorder(self) -> Callable[[torch.Tensor], None]:
        """Returns a function that stores each call's rows [r, H] behind those of the calls before."""
        next_row = 0

        def record(values_RH: torch.Tensor) -> None:
            nonlocal next_row
            self._values_RH[next_row : next_row + len(values_RH)] = values_RH
            next_row += len(values_RH)
            self._release(values_RH)

        return record

    def flush(self) -> None:
        """Writes everything to disk; after it a kill loses nothing of the file."""
        if self._map is not None:
            self._map.flush()

    def _release(self, values: torch.Tensor) -> None:
        self._touched += values.nbytes
        if self._map is not None and self._touched > RELEASE_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
