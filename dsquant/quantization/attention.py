"""How a layer's attention is quantized: scale groups in the order of the data flow, then clip and rounding."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from dsquant.model.overlays import Fold, FoldedWeights
from dsquant.model.structure import ScaleGroup
from dsquant.quantization.compensate import compensated_weight
from dsquant.quantization.scale import fold_of, search_group
from dsquant.quantization.statistics import InputMoments
from dsquant.rounding import Grid, QuantizedWeight, round_to_nearest
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
) -> AttentionResult:
    """Searches scales for every group that is quantized, folds them, clips and rounds.

    Args:
        weights: a layer's weights.
        moments: of each such group's input, in the order of the data flow.
        grid: the grid that scales are searched for.
        grid_of: gives the grid that a linear is rounded on.

    Returns:
        The quantized attention.
    """
    scales = {group: search_group(weights, group, grid, found).scales_I for group, found in moments.items()}
    fold = Fold()
    for group in moments:
        fold.update(fold_of(weights, group, scales[group]))
    folded = FoldedWeights(weights, fold)
    linears = {
        linear: compensated_weight(folded[f"{linear}.weight"], grid_of(linear), found.divided(scales[group]))
        for group, found in moments.items()
        for linear in group.consumers
    }
    return AttentionResult(fold, linears, scales)


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
