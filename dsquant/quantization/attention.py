"""How a layer's attention is quantized: scale groups in the order of the data flow, then clip and rounding."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dsquant.model.overlays import Fold, FoldedWeights
from dsquant.model.structure import DecoderLayer, ScaleGroup
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
    layer: DecoderLayer, weights: Weights, moments: Mapping[ScaleGroup, InputMoments], grid: Grid
) -> AttentionResult:
    """Searches scales for every group, folds them, clips and rounds.

    Args:
        layer: the layer.
        weights: its weights.
        moments: of each group's input.
        grid: the quantization grid.

    Returns:
        The quantized attention.
    """
    scales = {group: search_group(weights, group, grid, moments[group]).scales_I for group in layer.attention}
    fold = Fold()
    for group in layer.attention:
        fold.update(fold_of(weights, group, scales[group]))
    folded = FoldedWeights(weights, fold)
    linears = {
        linear: compensated_weight(folded[f"{linear}.weight"], grid, moments[group].divided(scales[group]))
        for group in layer.attention
        for linear in group.consumers
    }
    return AttentionResult(fold, linears, scales)


def round_attention(layer: DecoderLayer, weights: Weights, grid: Grid) -> AttentionResult:
    """Plain rounding of the attention's linears: what the search is measured against, and its fallback.

    Args:
        layer: the layer.
        weights: its weights.
        grid: the quantization grid.

    Returns:
        The rounded attention, with nothing folded.
    """
    linears = {linear: round_to_nearest(weights[f"{linear}.weight"], grid) for linear in layer.attention_linears}
    return AttentionResult(Fold(), linears)
