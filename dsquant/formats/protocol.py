"""What the rest of dsquant knows of an output format."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from dsquant.formats.shards import StoredTensor
from dsquant.schemes import Grid, QuantizedWeight

# Where no widths were chosen.
NO_WIDTHS: Mapping[str, int] = MappingProxyType({})


class Format(Protocol):
    """A way to store quantized linears in safetensors."""

    @property
    def name(self) -> str:
        """What `--to` calls it."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits of a code that it can hold, and 16 for linears that stay as they are."""

    def check(self, grid: Grid, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuses what the format or the engines that read it cannot hold.

        Args:
            grid: the quantization grid.
            shapes: linear -> [O, I] of everything to be quantized.

        Raises:
            UsageError: naming the linear, where it is about one.
        """

    def stored(self, linear: str, shape: tuple[int, int], grid: Grid) -> list[StoredTensor]:
        """The tensors that a quantized linear becomes.

        Args:
            linear: its module name.
            shape: [O, I].
            grid: the quantization grid.

        Returns:
            Names, dtypes and shapes.
        """

    def pack(self, linear: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packs a quantized weight into those tensors.

        Args:
            linear: its module name.
            weight: the weight.

        Returns:
            Tensor name -> tensor, as `stored` announced.
        """

    def unpack(self, linear: str, tensors: Mapping[str, torch.Tensor], grid: Grid) -> QuantizedWeight:
        """Undoes `pack`.

        Args:
            linear: its module name.
            tensors: tensor name -> tensor, as `stored` announced.
            grid: the quantization grid.

        Returns:
            The weight.
        """

    def quantization_config(
        self, grid: Grid, linears: Mapping[str, bool], widths: Mapping[str, int] = NO_WIDTHS
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            grid: the quantization grid.
            linears: every linear of the decoder -> whether it is quantized.
            widths: linear -> bits, where widths were chosen; else all have the grid's.

        Returns:
            Plain JSON values.
        """
