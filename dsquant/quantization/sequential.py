"""Quantizes one decoder layer for the inputs that the quantized model gives it: sequential calibration, step `follow`.

Linears are rounded in the order of the data flow. Each is fitted to what it reads once everything before it is
quantized, and aims at the original's output, or at its hidden states (`pairs`). So next to these there are those of the
quantized model, one for each grid; the layer's weights still pass through memory once, one expert at a time. Attention
runs twice for each of its scale groups, in both models, once more for the scales, and once more in each model for the
MLPs' inputs.

Several ranks run their samples each; rank 0 adds what attention's linears read, in the order of batches, and rounds
them. MLPs are shared among ranks.

Shape legend: N samples, T tokens, H hidden size, I in features, R tokens of all samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.overlays import Fold, FoldedWeights, ReplacedWeights, ResidentWeights
from dsquant.model.streaming import Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import ScaleGroup
from dsquant.quantization.attention import (
    AttentionResult,
    few_samples,
    fold_scales,
    keeps_attention,
    note_keys,
    round_attention,
    search_scales,
)
from dsquant.quantization.layer import checked, emit_dense_part, out_of_range, sum_up
from dsquant.quantization.layer_job import GridReport, LayerJob, LayerReport, QuantizedStream
from dsquant.quantization.mlp_inputs import mean_squares, read_by_mlps, token_weights
from dsquant.quantization.mlp_norm import search_norm_fold
from dsquant.quantization.output_metrics import attention_metrics
from dsquant.quantization.pairs import PairMoments, PairStatistics, makes_up
from dsquant.quantization.sequential_mlps import FollowingMlps, quantize_mlps
from dsquant.quantization.sharing import in_the_order_of_batches, share_routing, share_rows
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.schemes import QuantizedWeight, Scheme
from dsquant.source.weights import Weights


def quantize_sequentially(job: LayerJob) -> LayerReport:
    """Runs the original layer and those quantized onto each grid, quantizing as it goes, and hands all to `emit`.

    The job has a stream in `quantized` for every grid; the tokens per expert are those of the first one. Raises
    InputError where the original's hidden states are not finite.
    """
    return checked(job, _quantize)


def _quantize(job: LayerJob) -> LayerReport:
    original_routing, following, reports = _quantize_dense_part(job)
    found = quantize_mlps(job, original_routing, following)
    reports = job.ranks.once(lambda: reports)
    for place, report in enumerate(reports):
        sum_up(report, [outcomes[place] for outcomes in found])
    first = following[0]
    counts = first.routing.counts(len(job.layer.experts)).tolist() if first.routing else []
    return LayerReport(counts, dict(first.topped_up), reports)


def _quantize_dense_part(job: LayerJob) -> tuple[Routing | None, list[FollowingMlps], list[GridReport]]:
    """Runs both models up to their MLPs, quantizes and emits what comes before these."""
    job.safe_point(job.layer.attention_module)
    weights = ResidentWeights(job.weights)
    original = _run(job, weights, QuantizedStream(job.inputs, job.outputs, job.mlp_inputs))
    weights_R = token_weights(original.squares, job.ranks, weights.device)
    following, reports = [], []
    for grid in job.grids:
        report = GridReport()
        following.append(_quantize_for(job, grid, weights, weights_R, report))
        reports.append(report)
    return original.routing, following, reports


def _quantize_for(
    job: LayerJob, grid: Scheme, weights: Weights, weights_R: torch.Tensor, report: GridReport
) -> FollowingMlps:
    """Quantizes attention onto a grid, runs it, and searches the scales of the MLPs' norm for what comes out."""
    layer, quantized = job.layer, job.quantized[grid]
    streams, attention, replaced = _quantize_attention(job, grid, weights, weights_R, report)
    # What always-read MLPs put out is added once they are quantized, as for an expert.
    downs = [f"{mlp.down}.weight" for mlp in layer.mlps if mlp.expert is None]
    silenced = {down: torch.zeros(weights.shape(down), device=weights.device) for down in downs}
    found = _run(job, ReplacedWeights(streams.folded, {**replaced, **silenced}), quantized)
    if not bool(found.rms_H.isfinite().all()):
        raise out_of_range(layer.norm)
    inputs, added = read_by_mlps(job, quantized.mlp_inputs, found.routing, weights_R)
    fold, scales_H = search_norm_fold(job, grid, inputs, found.rms_H)
    if job.ranks.first:
        emit_dense_part(job, grid, attention, fold, report)
        for group, scales_I in attention.scales.items():
            job.keep_scales(grid, group.producer, scales_I)
        if fold.rows:
            job.keep_scales(grid, layer.norm, scales_H)
    topped_up = {expert: len(rows_R) for expert, rows_R in added.items()}
    return FollowingMlps(grid, quantized, inputs, scales_H, found.routing, topped_up)


@dataclass(frozen=True)
class _Run:
    """What the dense part of one model has shown."""

    routing: Routing | None
    """Of all samples."""
    rms_H: torch.Tensor
    """float32: the root mean square of the MLPs' inputs."""
    squares: Sequence[torch.Tensor]
    """The `mean_squares` of what this rank's batches put out."""


def _run(job: LayerJob, weights: Weights, stream: QuantizedStream) -> _Run:
    """Runs the dense part of one model: fills its `outputs`, still without experts, and `mlp_inputs`."""
    own, (_, num_tokens, hidden), device = job.shares.samples(job.ranks.rank), job.inputs.shape, job.weights.device
    squares = [torch.empty(0, hidden, dtype=torch.float64, device=device)]
    record = stream.mlp_inputs.recorder(own[0] * num_tokens)

    def note_mlp_inputs(inputs_RH: torch.Tensor) -> None:
        record(inputs_RH)
        squares.append(inputs_RH.square().sum(0, keepdim=True, dtype=torch.float64))

    squares_of_tokens: list[torch.Tensor] = []

    def after_batch(stop: int, outputs_NTH: torch.Tensor) -> None:
        del stop
        squares_of_tokens.append(mean_squares(outputs_NTH))

    routing, passing = None, Stream(weights, stream.inputs, stream.outputs)
    if own[0] < own[1]:
        with fast_matmuls(device):
            observers: dict[str, Observer] = {job.layer.mlp_module: note_mlp_inputs}
            routing = run_dense_part(job.skeleton, job.layer, passing, job.batch_samples, observers, own, after_batch)
    share_rows(stream.mlp_inputs, job.ranks, job.shares)
    sum_H = torch.zeros(hidden, dtype=torch.float64)
    for squares_H in torch.cat(job.ranks.gather(torch.cat(squares).cpu())):  # in the order of batches
        sum_H += squares_H
    rms_H = (sum_H.to(device) / stream.mlp_inputs.num_rows).sqrt().float()
    return _Run(share_routing(routing, job.ranks, device), rms_H, squares_of_tokens)


@dataclass(frozen=True)
class _Streams:
    """Attention in both models."""

    job: LayerJob
    quantized: QuantizedStream
    original: Weights
    folded: Weights
    """The original's with attention's scales folded in: the same function."""
    weights_R: torch.Tensor
    """float32 of all tokens: what multiplies their inputs of the linear whose outputs are added to hidden states."""

    def lack(self, batch: tuple[int, int]) -> torch.Tensor:
        """Returns by how much the hidden states of both models before the layer differ, float32 [R, H]."""
        original_NTH, quantized_NTH = (hidden.samples(*batch) for hidden in (self.job.inputs, self.quantized.inputs))
        return (original_NTH - quantized_NTH).flatten(0, 1)

    def read_in_original(self, batch: tuple[int, int], linears: Sequence[str]) -> list[torch.Tensor]:
        """Runs a batch of samples under the scales and returns what linears read, each [R, I]."""
        return self._read(self.folded, self.job.inputs, batch, linears)

    def read_in_quantized(
        self, replaced: Mapping[str, torch.Tensor], batch: tuple[int, int], linears: Sequence[str]
    ) -> list[torch.Tensor]:
        """Does the same in the quantized model with the given parameters replaced."""
        return self._read(ReplacedWeights(self.folded, replaced), self.quantized.inputs, batch, linears)

    def _read(
        self, weights: Weights, inputs: Activations, batch: tuple[int, int], linears: Sequence[str]
    ) -> list[torch.Tensor]:
        job, found = self.job, {linear: list[torch.Tensor]() for linear in linears}
        outputs_NTH = torch.empty(batch[1] - batch[0], *inputs.shape[1:], device=weights.device)
        stream = Stream(weights, inputs, Activations(outputs_NTH, first_sample=batch[0]))
        observers = {linear: seen.append for linear, seen in found.items()}
        with fast_matmuls(weights.device):
            run_dense_part(job.skeleton, job.layer, stream, job.batch_samples, observers, batch)
        return [seen[0] for seen in found.values()]


def _quantize_attention(
    job: LayerJob, grid: Scheme, weights: Weights, weights_R: torch.Tensor, report: GridReport
) -> tuple[_Streams, AttentionResult, dict[str, torch.Tensor]]:
    """Quantizes attention group by group; rounds it plainly where this brings its output nearer to the original's,
    or the hidden states behind it where it makes up for what they lack.

    Returns the models, what rank 0 emits, and the parameters that the quantized model has instead of the folded ones.
    """
    unfolded = _Streams(job, job.quantized[grid], weights, weights, weights_R)
    groups = [group for group in job.layer.attention if group.consumers[0] in job.linears[grid]]
    if not groups:
        return unfolded, AttentionResult(), {}
    scales = _searched_scales(unfolded, groups, grid) if "scales" in job.steps else {}
    fold = fold_scales(weights, scales)
    streams = replace(unfolded, folded=ResidentWeights(FoldedWeights(weights, fold)))
    metrics = _metrics(job, groups, fold) if job.ranks.first else {}
    linears: dict[str, QuantizedWeight] = {}
    moments: dict[ScaleGroup, InputMoments] = {}
    replaced: dict[str, torch.Tensor] = {}
    for group in groups:
        job.safe_point(group.consumers[0])
        pairs = _observed_pairs(streams, replaced, group.consumers[0], makes_up(job, grid, group.consumers[0]))
        if job.ranks.first:
            grids = [job.grid_of(grid, linear) for linear in group.consumers]
            folded = [streams.folded[f"{linear}.weight"] for linear in group.consumers]
            of_outputs = [metrics.get(linear) for linear in group.consumers]
            linears |= zip(group.consumers, pairs.rounded(folded, grids, job.steps, of_outputs), strict=True)
        if job.ranks.first and grid.noted:
            moments[group] = pairs.moments
        for linear in filter(partial(job.rounds, grid), group.consumers):
            name = f"{linear}.weight"
            replaced[name] = linears[linear].dequantize() if job.ranks.first else torch.empty_like(weights[name])
            job.ranks.broadcast(replaced[name])
    plain = round_attention(groups, weights, partial(job.grid_of, grid))
    searched = AttentionResult(fold, linears, scales)

    def keep() -> bool:
        own, behind = zip(_errors(streams, searched), _errors(unfolded, plain), strict=True)
        return keeps_attention(job, report, own, behind if makes_up(job, grid, job.layer.attention_output) else None)

    kept = job.ranks.once(keep)
    if job.ranks.first and grid.noted:
        _note(streams, grid, moments, scales, kept)
    if kept:
        return streams, searched, replaced
    return unfolded, plain, {name: plain_OI for name, plain_OI in plain.dequantized().items() if name in replaced}


def _metrics(job: LayerJob, groups: Sequence[ScaleGroup], fold: Fold) -> dict[str, torch.Tensor]:
    """Returns the metrics of what attention's folded linears put out, on rank 0."""
    found = attention_metrics(job, [linear for group in groups for linear in group.consumers])
    for linear, metric_OO in found.items():
        if (factor_O := fold.rows.get(f"{linear}.weight")) is not None:
            metric_OO.div_(factor_O).div_(factor_O.unsqueeze(1))
    return found


def _errors(streams: _Streams, attention: AttentionResult) -> tuple[float, float]:
    """Returns the squared error of what attention adds to the hidden states of a few samples, and that of the hidden
    states behind it, relative to what the original adds; tokens count as in the statistics of its output."""
    job = streams.job
    wanted, _ = few_samples(job, streams.original)
    found, _ = few_samples(job, ReplacedWeights(streams.folded, attention.dequantized()), streams.quantized.inputs)
    weights_NT1 = streams.weights_R[: wanted[:, :, 0].numel()].view(*wanted.shape[:2], 1)
    behind, lack = found - wanted, streams.lack((0, len(wanted))).view_as(wanted)
    parts = (behind + lack, behind, wanted - job.inputs.samples(0, len(wanted)))
    own, of_states, added = (float((part * weights_NT1).square().sum()) for part in parts)
    return own / added, of_states / added


def _note(
    streams: _Streams,
    grid: Scheme,
    moments: Mapping[ScaleGroup, InputMoments],
    scales: Mapping[ScaleGroup, torch.Tensor],
    kept: bool,
) -> None:
    """Notes the importance of what attention's linears read, from the moments under the scales, if these are `kept`."""
    for group, found in moments.items():
        read = found if kept or group not in scales else found.divided(1 / scales[group])
        for linear in group.consumers:
            streams.job.note(grid, linear, read.importance)
        if not grid.rounded:
            note_keys(streams.job, grid, group, found, streams.folded)


def _searched_scales(unfolded: _Streams, groups: Sequence[ScaleGroup], grid: Scheme) -> dict[ScaleGroup, torch.Tensor]:
    """Searches each group's scales by what it reads behind the quantized layers before this one; on every rank."""
    job, linears = unfolded.job, [group.consumers[0] for group in groups]
    widths = [job.weights.shape(f"{linear}.weight")[1] for linear in linears]
    statistics = [InputStatistics(width, job.seed, job.weights.device) for width in widths]
    for read in in_the_order_of_batches(job, lambda batch: unfolded.read_in_quantized({}, batch, linears), widths):
        with fast_matmuls(job.weights.device):
            for found, inputs_RI in zip(statistics, read, strict=True):
                found.add(inputs_RI)
    scales = {group: torch.ones(width, device=job.weights.device) for group, width in zip(groups, widths, strict=True)}
    if job.ranks.first:
        moments = {group: found.moments() for group, found in zip(groups, statistics, strict=True)}
        scales = search_scales(job, unfolded.original, moments, grid)
    for scales_I in scales.values():
        job.ranks.broadcast(scales_I)
    return scales


def _observed_pairs(streams: _Streams, replaced: Mapping[str, torch.Tensor], linear: str, fitted: bool) -> PairMoments:
    """Runs both models batch by batch; returns the moments of a linear's inputs on rank 0, empty ones elsewhere.

    Tokens have their weights at attention's output, which makes up for what hidden states lack where it is `fitted`.
    """
    job, width = streams.job, streams.job.weights.shape(f"{linear}.weight")[1]
    added = linear == job.layer.attention_output
    makes_up_for, widths = added and fitted, [width, width, job.inputs.shape[2]]

    def read(batch: tuple[int, int]) -> list[torch.Tensor]:
        of_both = streams.read_in_original(batch, [linear]), streams.read_in_quantized(replaced, batch, [linear])
        return [*of_both[0], *of_both[1], *([streams.lack(batch)] if makes_up_for else [])]

    statistics, seen = PairStatistics(width, job.seed, job.weights.device), 0
    for original_RI, quantized_RI, *lack in in_the_order_of_batches(job, read, widths[: 2 + makes_up_for]):
        weights_R = streams.weights_R[seen : seen + len(original_RI)] if added else None
        seen += len(original_RI)
        with fast_matmuls(job.weights.device):
            statistics.add(original_RI, quantized_RI, weights_R, *lack)
    return statistics.moments()
