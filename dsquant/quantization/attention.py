"""How a layer's attention is quantized: scale groups in the order of the data flow, then clip and rounding."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from dsquant.model.overlays import Fold, FoldedWeights, fold_of
from dsquant.model.structure import ScaleGroup
from dsquant.quantization.scale import search_group
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import prepared, rounded_weight
from dsquant.recipes import Step
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest
from dsquant.source.weights import Weights


@dataclass(frozen=True)
class AttentionResult:
    """A layer's quantized attention; empty where the preset leaves attention alone."""

    fold: Fold = field(default_factory=Fold)
    linears: dict[str, QuantizedWeight] = field(default_factory=dict)
    """By linear, of the folded weights."""
    scales: dict[ScaleGroup, torch.Tensor] = field(default_factory=dict)
    """By group, float32 [I]; none where nothing is folded."""

    def dequantized(self) -> dict[str, torch.Tensor]:
        """Parameter name -> what an engine computes with."""
        return {f"{linear}.weight": weight.dequantize() for linear, weight in self.linears.items()}


def quantize_attention(
    weights: Weights,
    moments: Mapping[ScaleGroup, InputMoments],
    grid: Grid,
    grid_of: Callable[[str], Grid],
    steps: Collection[Step],
) -> AttentionResult:
    """Searches scales for every group that is quantized, folds them and rounds, as far as these are steps.

    Args:
        weights: a layer's weights.
        moments: of each such group's input, in the order of the data flow.
        grid: the grid that scales are searched for.
        grid_of: gives the grid that a linear is rounded on.
        steps: of the quantization.

    Returns:
        The quantized attention.
    """
    fold, scales = search_scales(weights, moments, grid, steps)
    folded = FoldedWeights(weights, fold)
    linears: dict[str, QuantizedWeight] = {}
    for group, found in moments.items():
        divided = prepared(under_scales(found, scales.get(group)), grid, steps)
        for linear in group.consumers:
            linears[linear] = rounded_weight(folded[f"{linear}.weight"], grid_of(linear), divided, steps)
    return AttentionResult(fold, linears, scales)


def search_scales(
    weights: Weights, moments: Mapping[ScaleGroup, InputMoments], grid: Grid, steps: Collection[Step]
) -> tuple[Fold, dict[ScaleGroup, torch.Tensor]]:
    """Searches the scales of every group.

    Args:
        weights: a layer's weights.
        moments: of each group's input.
        grid: the grid that scales are searched for.
        steps: of the quantization.

    Returns:
        The fold, and by group the scales, float32 [I]; nothing in either where `scales` is no step.
    """
    fold = Fold()
    if "scales" not in steps:
        return fold, {}
    scales = {group: search_group(weights, group, grid, found).scales_I for group, found in moments.items()}
    for group in moments:
        fold.update(fold_of(weights, group, scales[group]))
    return fold, scales


def under_scales(moments: InputMoments, scales_I: torch.Tensor | None) -> InputMoments:
    """The moments of a group's input once its scales are folded; as they are where it has none."""
    return moments if scales_I is None else moments.divided(scales_I)


def round_attention(linears: Iterable[str], weights: Weights, grid_of: Callable[[str], Grid]) -> AttentionResult:
    """Plain rounding of the attention's linears: what the search is measured against, and its fallback.

    Args:
        linears: those to round.
        weights: their layer's weights.
        grid_of: gives the grid that a linear is rounded on.

    Returns:
        The rounded attention, with nothing folded.
    """
    rounded = {linear: round_to_nearest(weights[f"{linear}.weight"], grid_of(linear)) for linear in linears}
    return AttentionResult(Fold(), rounded)
