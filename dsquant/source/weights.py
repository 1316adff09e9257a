"""The lazy mapping through which all weights are read."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from dsquant.kernels.activation_rounding import Rounding, unrounded

CPU = torch.device("cpu")


class Weights(Mapping[str, torch.Tensor]):
    """name -> float32 tensor on `device`, read on each access and never cached."""

    device: torch.device = CPU

    def prefetch(self, names: Sequence[str]) -> None:
        """Starts to read weights that are needed next; a mapping that cannot read ahead does nothing."""

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

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Returns whether there is such a weight, without reading it."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name)
