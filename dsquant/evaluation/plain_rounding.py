"""Rounds the original plainly to the grids of a candidate: the yardstick for what its scales and steps gain."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from dsquant.evaluation.opening import Opened
from dsquant.kernels.activation_rounding import Rounding
from dsquant.model.overlays import Overlay
from dsquant.schemes import Scheme, fake_quantize
from dsquant.source.weights import Weights

NAME = "{}, plain"


class PlainWeights(Overlay):
    """The original's weights, each rounded to the nearest numbers that a candidate's format can hold."""

    def __init__(self, original: Weights, candidate: Weights) -> None:
        super().__init__(original)
        self.names = {name: candidate.scheme(name) for name in original if name in candidate}
        self.schemes: dict[str, Scheme] = {name: scheme for name, scheme in self.names.items() if scheme is not None}
        self._candidate = candidate

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        weight_OI = self.base.rows(name, start_row, stop_row)
        if name not in self.schemes:
            return weight_OI
        return fake_quantize(weight_OI, self.schemes[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name)

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        """Rounds as where the candidate runs: only the weights are to differ."""
        return self._candidate.activation_quantizer(name, values)


def with_plain_rounding(
    original: Weights, candidates: Mapping[str, Opened]
) -> tuple[dict[str, Opened], dict[str, str]]:
    """Returns the candidates, each followed by its yardstick, and yardstick -> candidate.

    None has a candidate of floats, one on the grids of an earlier one, and one with ggml's types of floats, such as
    NVFP4. Types with code books take the points that are nearest where all columns weigh alike.
    """
    models: dict[str, Opened] = {}
    plain_of: dict[str, str] = {}
    known: list[dict[str, Scheme]] = [{}]
    for name, candidate in candidates.items():
        models[name] = candidate
        try:
            weights = PlainWeights(original, candidate.weights)
        except LookupError:
            continue
        if weights.schemes not in known:
            known.append(weights.schemes)
            plain = NAME.format(name)
            models[plain] = replace(candidate, path=NAME.format(candidate.path), weights=weights, index=None)
            plain_of[plain] = name
    return models, plain_of
