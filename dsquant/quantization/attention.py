"""Quantizes a layer's attention: scale groups in the order of the data flow, then clip and rounding."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.model.activations import Activations
from dsquant.model.overlays import Fold, FoldedWeights, ReplacedWeights, ResidentWeights, fold_of
from dsquant.model.streaming import Routing, Stream, run_dense_part
from dsquant.model.structure import KEYS_SUFFIX, ScaleGroup
from dsquant.quantization.layer_job import GridReport, LayerJob
from dsquant.quantization.scale import best_for_all, group_candidates, is_kept, rms_of_columns
from dsquant.quantization.statistics import Importance, InputMoments
from dsquant.quantization.steps import prepared, rounded_weight
from dsquant.schemes import QuantizedWeight, Scheme, fitted_together, round_to_nearest
from dsquant.source.weights import Weights

# Attention's output error is measured, and folds are proven, on at most this many samples.
CHECK_SAMPLES = 2


@dataclass(frozen=True)
class AttentionResult:
    """A layer's quantized attention; empty where the preset leaves attention alone."""

    fold: Fold = field(default_factory=Fold)
    linears: dict[str, QuantizedWeight] = field(default_factory=dict)
    """By linear, of the folded weights."""
    scales: dict[ScaleGroup, torch.Tensor] = field(default_factory=dict)
    """By group, float32 [I]; none where nothing is folded."""

    def dequantized(self) -> dict[str, torch.Tensor]:
        """Returns each parameter as an engine computes with it, by name."""
        return {f"{linear}.weight": weight.dequantize() for linear, weight in self.linears.items()}


def quantize_attention(
    job: LayerJob, grid: Scheme, moments: Mapping[ScaleGroup, InputMoments], report: GridReport
) -> AttentionResult:
    """Searches scales for every group that is quantized, folds them and rounds, as far as these are steps.

    `moments` are those of each group's input, in the order of the data flow. The linears are plainly rounded where that
    comes nearer to the original's output; `report` gets the errors.
    """
    own = {group: found for group, found in moments.items() if group.consumers[0] in job.linears[grid]}
    if not own:
        return AttentionResult()
    weights, grid_of = ResidentWeights(job.weights), partial(job.grid_of, grid)
    scales = search_scales(job, weights, own, grid)
    fold = fold_scales(weights, scales)
    folded, linears = FoldedWeights(weights, fold), dict[str, QuantizedWeight]()
    for group, found in own.items():
        divided = prepared(under_scales(found, scales.get(group)), map(grid_of, group.consumers), job.steps)
        parts, schemes = read_together(folded, group, grid_of)
        for linear, weight, scheme in zip(group.consumers, parts, schemes, strict=True):
            linears[linear] = rounded_weight(weight, scheme, divided, job.steps)
    searched, plain = AttentionResult(fold, linears, scales), round_attention(own, weights, grid_of)
    wanted, _ = few_samples(job, weights)
    energy = (wanted - job.inputs.samples(0, len(wanted))).square().sum()

    def error(result: AttentionResult) -> float:
        quantized = ReplacedWeights(FoldedWeights(weights, result.fold), result.dequantized())
        found, _ = few_samples(job, quantized)
        return float((found - wanted).square().sum() / energy)

    return searched if keeps_attention(job, report, (error(searched), error(plain))) else plain


def keeps_attention(
    job: LayerJob, report: GridReport, errors: tuple[float, float], behind: tuple[float, float] | None = None
) -> bool:
    """Returns whether attention is kept as searched, and takes the output errors, searched and plain, into the report.

    They decide, or the errors of the hidden states `behind` it.
    """
    kept, (error, error_plain) = is_kept(*(behind or errors)), errors
    report.attention_error, report.attention_error_plain = error if kept else error_plain, error_plain
    if not kept:
        report.fallbacks.append(job.layer.attention_module)
    return kept


def search_scales(
    job: LayerJob,
    weights: Weights,
    moments: Mapping[ScaleGroup, InputMoments],
    grid: Scheme,
    ranks: Ranks = ALONE,
) -> dict[ScaleGroup, torch.Tensor]:
    """Returns the scales, float32 [I], of every group that they are folded into; `ranks` take the candidates in
    turns."""
    return {
        group: _searched(weights, group, found, grid, job.scales_blocks(grid, group), ranks)
        for group, found in moments.items()
        if job.folds(grid, group)
    }


def fold_scales(weights: Weights, scales: Mapping[ScaleGroup, torch.Tensor]) -> Fold:
    """Returns the fold of all groups' scales."""
    fold = Fold()
    for group, scales_I in scales.items():
        fold.update(fold_of(weights, group, scales_I))
    return fold


def _searched(
    weights: Weights, group: ScaleGroup, moments: InputMoments, grid: Scheme, exact: bool, ranks: Ranks
) -> torch.Tensor:
    consumers = [weights[f"{linear}.weight"] for linear in group.consumers]
    columns_I, producer = rms_of_columns(consumers), weights[f"{group.producer}.weight"]
    scales_CI = group_candidates(group, producer, moments.rms_I, columns_I, exact)
    return best_for_all(scales_CI, consumers, moments, grid, ranks)


def under_scales(moments: InputMoments, scales_I: torch.Tensor | None) -> InputMoments:
    """Returns the moments of a group's input once its scales, if any, are folded."""
    return moments if scales_I is None else moments.divided(scales_I)


def read_together(
    weights: Weights, group: ScaleGroup, grid_of: Callable[[str], Scheme]
) -> tuple[list[torch.Tensor], list[Scheme]]:
    """Returns the weights of a group's consumers, and their schemes, fitted to what they share."""
    parts = [weights[f"{linear}.weight"] for linear in group.consumers]
    return parts, fitted_together([grid_of(linear) for linear in group.consumers], parts)


def round_attention(
    groups: Iterable[ScaleGroup], weights: Weights, grid_of: Callable[[str], Scheme]
) -> AttentionResult:
    """Rounds attention's linears plainly, with nothing folded: the search's yardstick and its fallback."""
    rounded: dict[str, QuantizedWeight] = {}
    for group in groups:
        found = zip(*read_together(weights, group, grid_of), strict=True)
        rounded |= zip(group.consumers, (round_to_nearest(*one) for one in found), strict=True)
    return AttentionResult(Fold(), rounded)


def note_attention(
    job: LayerJob, grid: Scheme, moments: Mapping[ScaleGroup, InputMoments], scales: Mapping[ScaleGroup, torch.Tensor]
) -> None:
    """Notes the importance of the inputs of attention's linears under the scales, float32 [I] of each scaled group."""
    for group, group_moments in moments.items():
        importance = under_scales(group_moments, scales.get(group)).importance
        for linear in group.consumers:
            job.note(grid, linear, importance)
        if not grid.rounded:
            note_keys(job, grid, group, group_moments, job.weights)  # folding does not change what comes out of it


def note_keys(job: LayerJob, grid: Scheme, group: ScaleGroup, moments: InputMoments, weights: Weights) -> None:
    """Notes the importance of what the keys of latent attention are multiplied with, where a group's linears make it.

    `moments` are those of the inputs of `weights`.
    """
    absorbed = job.layer.absorbed
    if absorbed and absorbed.queries in group.consumers:
        squares_O = moments.loss_O(weights[f"{absorbed.queries}.weight"])
        keys = squares_O.unflatten(0, (absorbed.num_heads, -1))[:, : absorbed.key_rows] * moments.count
        job.note(grid, absorbed.keys_and_values + KEYS_SUFFIX, Importance(keys.contiguous(), moments.count))


def few_samples(
    job: LayerJob, weights: Weights, hidden: Activations | None = None
) -> tuple[torch.Tensor, Routing | None]:
    """Runs a few samples of the layer's inputs, or of `hidden` [N, T, H], through its dense part under other weights.

    Returns the outputs, float32 [n, T, H], and the routing.
    """
    hidden = hidden or job.inputs
    inputs = Activations(hidden.samples(0, min(CHECK_SAMPLES, hidden.shape[0])))
    outputs = Activations(torch.zeros(inputs.shape, device=job.weights.device))
    routing = run_dense_part(job.skeleton, job.layer, Stream(weights, inputs, outputs), job.batch_samples)
    return outputs.samples(0, inputs.shape[0]), routing
