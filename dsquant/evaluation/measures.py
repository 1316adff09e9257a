"""Measurements of a model that runs alongside the original, before they are summarized.

Shape legend: N samples, T tokens of a sample.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dsquant.evaluation.divergence import TokenScores
from dsquant.evaluation.results import WeightError
from dsquant.evaluation.weight_errors import in_parts, relative_error


@dataclass(frozen=True)
class LayerMeasures:
    """One model against the original in one layer; the names are those of `results.LayerScores`."""

    hidden_error: float
    local_error: float
    local_attention_error: float
    local_mlp_error: float
    overlap_NT: torch.Tensor | None = None
    """float64 [N, T]: share of the original's experts chosen too, by token."""
    local_overlap: float | None = None
    weight_distance: float | None = None
    load_shift: float | None = None


@dataclass(frozen=True)
class Measures:
    """All measurements of one model."""

    tokens: TokenScores
    layers: tuple[LayerMeasures, ...]
    lens_kl: tuple[float, ...]
    """Mean KL after every layer."""
    weights: tuple[WeightError, ...]
    """Errors of every tensor."""


class Distance:
    """Sums of squares: |candidate - original| / |original|."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, original: torch.Tensor, candidate: torch.Tensor) -> None:
        """Adds a part of both."""
        for wanted, found in zip(in_parts(original), in_parts(candidate), strict=True):
            error, size = (found - wanted).double().square_().sum(), wanted.double().square_().sum()
            self._sums.append(torch.stack((error, size)))

    @property
    def terms(self) -> list[tuple[float, float]]:
        """Squares of the difference and of the original, of each part, in their order."""
        return [(error, size) for error, size in torch.stack(self._sums).tolist()] if self._sums else []

    @property
    def relative(self) -> float:
        """The root of the ratio."""
        return relative_of(self.terms)


def relative_of(terms: Iterable[tuple[float, float]]) -> float:
    """Returns the root of the ratio of what parts add up to, in their order."""
    error = size = 0.0
    for more_error, more_size in terms:
        error, size = error + more_error, size + more_size
    return relative_error(error, size)
