"""The lazy mapping through which all weights are read."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dsquant.kernels.activation_rounding import Rounding, unrounded
from dsquant.schemes import Scheme

CPU = torch.device("cpu")


class Weights(Mapping[str, torch.Tensor]):
    """name -> float32 tensor on `device`, read on each access and never cached."""

    device: torch.device = CPU
    names: Mapping[str, Any]
    """Its keys, in their order; the values are the subclass's own."""

    def prefetch(self, names: Sequence[str]) -> int:
        """Starts to read weights that are needed next; returns the bytes that this reads. A mapping that cannot read
        ahead does nothing."""
        return 0

    @abstractmethod
    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads rows start_row..stop_row-1 of a weight, float32, so that a table need not be in memory as a whole."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the weight's shape, from headers alone."""

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        """Returns how the engine rounds a linear's inputs; for MLA's kv_b_proj, the queries, or with `values` the mixed
        latents.

        Most engines round nothing.
        """
        return unrounded

    def scheme(self, name: str) -> Scheme | None:
        """Returns what a weight was rounded to, None where it is floats; raises LookupError where no scheme says it."""
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # without reading the weight, unlike Mapping's own

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name)
