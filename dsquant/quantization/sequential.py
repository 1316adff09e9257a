"""Quantizes one decoder layer for the inputs that the quantized model gives it: sequential calibration, step `follow`.

Linears are rounded in the order of the data flow. Each is fitted to what it reads once everything before it is
quantized, and aims at the original's output (`pairs`). So the layer has two streams of hidden states, the original's
and the quantized model's; its weights still pass through memory once, one expert at a time. Attention runs once for
each of its scale groups and streams, once more for the scales, and once more for the MLPs' inputs.

Shape legend: N samples, T tokens, H hidden size, R tokens of all samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.overlays import FoldedWeights, ReplacedWeights, ResidentWeights
from dsquant.model.streaming import Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import Mlp, ScaleGroup
from dsquant.quantization.attention import AttentionResult, few_samples, keeps_attention, round_attention, search_scales
from dsquant.quantization.layer import checked, emit_dense_part, sum_up
from dsquant.quantization.layer_job import GridReport, LayerJob, LayerReport, QuantizedStream
from dsquant.quantization.mlp_inputs import read_by_mlps
from dsquant.quantization.mlp_norm import search_norm_fold
from dsquant.quantization.pairs import PairMoments, PairStatistics
from dsquant.quantization.sequential_mlps import quantize_mlps
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.weights import Weights


def quantize_sequentially(job: LayerJob) -> LayerReport:
    """Runs the original and the quantized layer, quantizing as it goes, and hands everything to `emit`.

    The job has `quantized` and one grid; the tokens per expert are the quantized model's. Raises InputError where the
    original's hidden states are not finite.
    """
    return checked(job, _quantize)


@dataclass(frozen=True)
class _Streams:
    """The layer's dense part in both models."""

    job: LayerJob
    quantized: QuantizedStream
    original_weights: Weights
    folded: Weights
    """The original's with attention's scales folded in: the same function."""

    def run_original(self, samples: tuple[int, int], observers: Mapping[str, Observer], folded: bool) -> Routing | None:
        """Runs samples of the original; its outputs lack routed experts."""
        weights = self.folded if folded else self.original_weights
        return self._run(Stream(weights, self.job.inputs, self.job.outputs), samples, observers)

    def run_quantized(
        self, replaced: Mapping[str, torch.Tensor], samples: tuple[int, int], observers: Mapping[str, Observer]
    ) -> Routing | None:
        """Runs samples of the quantized model with the given parameters replaced."""
        weights = ReplacedWeights(self.folded, replaced)
        return self._run(Stream(weights, self.quantized.inputs, self.quantized.outputs), samples, observers)

    def _run(self, stream: Stream, samples: tuple[int, int], observers: Mapping[str, Observer]) -> Routing | None:
        job = self.job
        with fast_matmuls(job.weights.device):
            return run_dense_part(job.skeleton, job.layer, stream, job.batch_samples, observers, samples)


def _quantize(job: LayerJob) -> LayerReport:
    (grid,), layer, quantized = job.grids, job.layer, job.quantized
    assert quantized is not None and job.ranks.size == 1
    everything, report = (0, job.inputs.shape[0]), GridReport()
    job.safe_point(layer.attention_module)
    streams, attention = _quantize_attention(job, quantized, grid, report)
    original_routing = streams.run_original(everything, {layer.mlp_module: job.mlp_inputs.recorder()}, folded=False)
    squares_H = torch.zeros(job.inputs.shape[2], dtype=torch.float64, device=job.weights.device)
    record = quantized.mlp_inputs.recorder()

    def note_mlp_inputs(inputs_RH: torch.Tensor) -> None:
        record(inputs_RH)
        squares_H.add_(inputs_RH.square().sum(0, dtype=torch.float64))

    # What always-read MLPs put out is added once they are quantized, as for an expert.
    silenced = {f"{mlp.down}.weight": torch.zeros_like(job.weights[f"{mlp.down}.weight"]) for mlp in _unrouted(job)}
    routing = streams.run_quantized(attention.dequantized() | silenced, everything, {layer.mlp_module: note_mlp_inputs})
    rms_H = (squares_H / job.mlp_inputs.num_rows).sqrt().float()
    if not bool(rms_H.isfinite().all()):
        raise FloatingPointError(layer.norm)
    inputs, added = read_by_mlps(job, quantized.mlp_inputs, routing)
    fold, scales_H = search_norm_fold(job, grid, inputs, rms_H)
    emit_dense_part(job, grid, attention, fold, report)
    for group, scales_I in attention.scales.items():
        job.keep_scales(grid, group.producer, scales_I)
    if fold.rows:
        job.keep_scales(grid, layer.norm, scales_H)
    sum_up(report, quantize_mlps(job, inputs, scales_H, (original_routing, routing)))
    counts = routing.counts(len(layer.experts)).tolist() if routing else []
    return LayerReport(counts, {expert: len(rows_R) for expert, rows_R in added.items()}, [report])


def _unrouted(job: LayerJob) -> list[Mlp]:
    return [mlp for mlp in job.layer.mlps if mlp.expert is None]


def _quantize_attention(
    job: LayerJob, quantized: QuantizedStream, grid: Grid, report: GridReport
) -> tuple[_Streams, AttentionResult]:
    """Quantizes attention group by group; rounds it plainly where its output is nearer to the original's then."""
    weights = ResidentWeights(job.weights)
    unfolded = _Streams(job, quantized, weights, weights)
    groups = [group for group in job.layer.attention if group.consumers[0] in job.linears[grid]]
    moments = _behind_quantized_layers(unfolded, groups) if "scales" in job.steps else {}
    fold, scales = search_scales(weights, moments, grid, job.steps)
    streams = _Streams(job, quantized, weights, ResidentWeights(FoldedWeights(weights, fold)))
    linears: dict[str, QuantizedWeight] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for group in groups:
        job.safe_point(group.consumers[0])
        pairs = _observed_pairs(streams, dequantized, group.consumers[0])
        rounded = pairs.rounded([streams.folded[f"{linear}.weight"] for linear in group.consumers], grid, job.steps)
        for linear, weight in zip(group.consumers, rounded, strict=True):
            linears[linear], dequantized[f"{linear}.weight"] = weight, weight.dequantize()
    searched, plain = AttentionResult(fold, linears, scales), round_attention(linears, weights, lambda _: grid)
    if keeps_attention(job, report, _error(streams, searched), _error(unfolded, plain)):
        return streams, searched
    return unfolded, plain


def _error(streams: _Streams, attention: AttentionResult) -> float:
    """Returns the relative squared error of what attention adds to the hidden states of a few samples."""
    job = streams.job
    wanted, _ = few_samples(job, streams.original_weights)
    found, _ = few_samples(job, ReplacedWeights(streams.folded, attention.dequantized()), streams.quantized.inputs)
    wanted -= job.inputs.samples(0, len(wanted))
    found -= streams.quantized.inputs.samples(0, len(found))
    return float((found - wanted).square().sum() / wanted.square().sum())


def _behind_quantized_layers(streams: _Streams, groups: Sequence[ScaleGroup]) -> dict[ScaleGroup, InputMoments]:
    """Returns the moments of the groups' inputs behind the quantized layers before this one."""
    job, width_of = streams.job, streams.job.weights.shape
    statistics = {
        group: InputStatistics(width_of(f"{group.consumers[0]}.weight")[1], job.seed, job.weights.device)
        for group in groups
    }
    observers = {group.consumers[0]: found.add for group, found in statistics.items()}
    streams.run_quantized({}, (0, job.inputs.shape[0]), observers)
    return {group: found.moments() for group, found in statistics.items()}


def _observed_pairs(streams: _Streams, replaced: Mapping[str, torch.Tensor], linear: str) -> PairMoments:
    """Runs both models batch by batch and returns the moments of a linear's inputs in them."""
    job = streams.job
    statistics = PairStatistics(job.weights.shape(f"{linear}.weight")[1], job.seed, job.weights.device)
    seen: list[torch.Tensor] = []
    for start in range(0, job.inputs.shape[0], job.batch_samples):
        samples = (start, min(start + job.batch_samples, job.inputs.shape[0]))
        streams.run_original(samples, {linear: seen.append}, folded=True)
        streams.run_quantized(replaced, samples, {linear: seen.append})
        original_RI, quantized_RI = seen
        with fast_matmuls(job.weights.device):
            statistics.add(original_RI, quantized_RI)
        seen.clear()
    return statistics.moments()
