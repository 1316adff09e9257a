"""The lazy mapping that everything reads weights through."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from dsquant.kernels.activation_rounding import Rounding, unrounded

CPU = torch.device("cpu")


class Weights(Mapping[str, torch.Tensor]):
    """name -> float32 tensor on `device`, read on each access and kept by nobody."""

    device: torch.device = CPU

    def prefetch(self, names: Sequence[str]) -> None:
        """Begins to read weights that are wanted next; a mapping that cannot read ahead does nothing."""

    @abstractmethod
    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        """Reads some rows of a weight, so that a table need not be in memory as a whole.

        Args:
            name: the weight's name.
            start_row: first row.
            stop_row: one past the last row; None means the end.

        Returns:
            float32 [stop_row - start_row, ...].
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The weight's shape, from headers alone."""

    def rounding_beside(self, name: str, values: bool = False) -> Rounding:
        """How the engine that runs these weights rounds what it multiplies with one of them; most do not.

        Args:
            name: the weight's name.
            values: of MLA's kv_b_proj, the rows that make values are meant; else those that make keys.

        Returns:
            The rounding of what meets the weight: a linear's inputs; beside kv_b_proj queries or mixed latents.
        """
        return unrounded

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is such a weight, without reading it."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name)
