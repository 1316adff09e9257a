"""Weights seen through a change that is made on access: folded scales, replaced tensors.

A mapping over a mapping: the layer that runs on it is always the same transformers code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dsquant.kernels.activation_rounding import Rounding
from dsquant.model.structure import ScaleGroup
from dsquant.schemes import Scheme
from dsquant.source.weights import Weights


@dataclass
class Fold:
    """Factors by which folded scales multiply parameters; together they leave the network's function unchanged."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameter -> float32 [O], factor of each output row (or element of a vector)."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameter -> float32 [I], factor of each input column."""

    def apply(self, name: str, weight: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        """Returns the parameter, or its rows from `first_row` on, times its factors; itself where it has none."""
        if name in self.rows:
            rows = self.rows[name][first_row : first_row + len(weight)]
            weight = weight * (rows.unsqueeze(1) if weight.dim() == 2 else rows)
        if name in self.columns:
            weight = weight * self.columns[name]
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self.rows or name in self.columns

    def update(self, other: "Fold") -> None:
        """Takes over another fold's factors; both scaling one parameter the same way would be a bug."""
        assert not self.rows.keys() & other.rows.keys() and not self.columns.keys() & other.columns.keys()
        self.rows.update(other.rows)
        self.columns.update(other.columns)


class Overlay(Weights):
    """Base of the mappings here: names and shapes are the base mapping's."""

    def __init__(self, base: Weights) -> None:
        self.base = self.names = base
        self.device = base.device

    def prefetch(self, names: Sequence[str]) -> int:
        return self.base.prefetch(names)

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        return self.base.rows(name, start_row, stop_row)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        return self.base.activation_quantizer(name, values)

    def scheme(self, name: str) -> Scheme | None:
        return self.base.scheme(name)


class MovedWeights(Overlay):
    """The base's weights on another device."""

    def __init__(self, base: Weights, device: torch.device) -> None:
        super().__init__(base)
        self.device = device

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        return self.base.rows(name, start_row, stop_row).to(self.device)


def on_device(weights: Weights, device: torch.device) -> Weights:
    """Returns weights on a device: the same object where they are there already."""
    return weights if weights.device == device else MovedWeights(weights, device)


class ReplacedWeights(Overlay):
    """The base's weights with some in memory instead."""

    def __init__(self, base: Weights, replaced: Mapping[str, torch.Tensor]) -> None:
        super().__init__(base)
        self.replaced = replaced

    def prefetch(self, names: Sequence[str]) -> int:
        return self.base.prefetch([name for name in names if name not in self.replaced])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.replaced[name] if name in self.replaced else self.base[name]


class WatchedWeights(Overlay):
    """The base's weights; `not_finite` is called with the name of each tensor read that holds NaN or infinity: on a
    GPU, whose answer takes until it has finished what it was given before, by `settle`."""

    def __init__(self, base: Weights, not_finite: Callable[[str], None]) -> None:
        super().__init__(base)
        self.not_finite = not_finite
        self._asked: list[tuple[str, torch.Tensor]] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._watched(name, self.base[name])

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        return self._watched(name, self.base.rows(name, start_row, stop_row))

    def settle(self) -> None:
        """Waits for a GPU's answers."""
        asked, self._asked = self._asked, []
        finite = torch.stack([answer for _, answer in asked]).tolist() if asked else []
        for (name, _), is_finite in zip(asked, finite, strict=True):
            if not is_finite:
                self.not_finite(name)

    def _watched(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if values.is_cuda:
            self._asked.append((name, values.isfinite().all()))
        elif not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):  # a sum needs no memory
            self.not_finite(name)
        return values


class FoldedWeights(Overlay):
    """The base's weights with scales folded in."""

    def __init__(self, base: Weights, fold: Fold) -> None:
        super().__init__(base)
        self.fold = fold

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.fold.apply(name, self.base[name])


class ResidentWeights(Overlay):
    """Keeps everything that is read: for a layer's few weights that many batches need."""

    def __init__(self, base: Weights) -> None:
        super().__init__(base)
        self._kept: dict[str, torch.Tensor] = {}

    def prefetch(self, names: Sequence[str]) -> int:
        return self.base.prefetch([name for name in names if name not in self._kept])

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = self.base[name]
        return self._kept[name]


def fold_of(weights: Weights, group: ScaleGroup, scales_I: torch.Tensor) -> Fold:
    """Returns the factors of scales folded into a group: producer divided, consumers and followers multiplied."""
    rows = 1 / scales_I
    if group.producer_rows is not None:
        rows = torch.ones(weights.shape(f"{group.producer}.weight")[0], device=scales_I.device)
        rows[torch.tensor(group.producer_rows, device=scales_I.device)] = 1 / scales_I
    scaled = [f"{group.producer}.{part}" for part in ("weight", "bias")]
    columns = [*(f"{name}.weight" for name in group.consumers), *group.followers]
    return Fold({name: rows for name in scaled if name in weights}, dict.fromkeys(columns, scales_I))
