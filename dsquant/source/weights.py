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

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        """Returns how the engine rounds the activations that it multiplies with a weight; most engines do not.

        Args:
            name: the weight's name.
            values: for MLA's kv_b_proj, whether its value rows are meant rather than its key rows.

        Returns:
            The rounding of a linear's inputs; for kv_b_proj, of the queries or of the mixed latents.
        """
        return unrounded

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is such a weight, without reading it."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name)
