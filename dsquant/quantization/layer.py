"""Quantizes one decoder layer: the original's forward, the search, the proof, and what a writer gets.

The layer's weights pass through memory once, one expert at a time; some experts are read again for the search of the
scales that all of them share (`mlp_norm`). The next layer's inputs are the original layer's outputs.

Shape legend: N samples, T tokens, H hidden size, R tokens of all samples, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsquant.errors import InputError
from dsquant.kernels.precision import fast_matmuls
from dsquant.model.overlays import Fold, FoldedWeights, ResidentWeights
from dsquant.model.streaming import Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import ScaleGroup
from dsquant.quantization.attention import AttentionResult, few_samples, note_attention, quantize_attention
from dsquant.quantization.layer_job import GridReport, LayerJob, LayerReport
from dsquant.quantization.layer_mlps import MlpOutcome, quantize_mlps
from dsquant.quantization.mlp import prove_same
from dsquant.quantization.mlp_inputs import mean_squares, read_by_mlps, token_weights
from dsquant.quantization.mlp_norm import search_norm_fold
from dsquant.quantization.sharing import SampleStatistics, share_routing, share_rows
from dsquant.quantization.statistics import InputMoments
from dsquant.schemes import Scheme


def quantize_layer(job: LayerJob) -> LayerReport:
    """Runs the original layer, quantizes it onto every grid and hands everything to `emit`.

    Raises InputError where the original's hidden states are not finite.
    """
    return checked(job, _quantize)


def checked(job: LayerJob, quantize: Callable[[LayerJob], LayerReport]) -> LayerReport:
    """Returns a layer's report from `quantize`; raises InputError where the original's outputs are not finite."""
    try:
        report = quantize(job)
    except FloatingPointError as error:
        raise out_of_range(job.layer.prefix) from error
    job.ranks.together(lambda: check_outputs(job))
    return report


def out_of_range(where: str) -> InputError:
    """Makes the error for hidden states that are not finite."""
    return InputError(
        f"{where}: the hidden states are not finite here; the weights of this or an earlier layer, or numbers in "
        "config.json, are out of any sensible range. Correct the model and run again."
    )


def check_outputs(job: LayerJob) -> None:
    """Raises InputError where outputs of this rank's samples are not finite."""
    first, end = job.shares.samples(job.ranks.rank)
    for start in range(first, end, job.batch_samples):
        if not bool(job.outputs.samples(start, min(start + job.batch_samples, end)).isfinite().all()):
            raise out_of_range(f"{job.layer.prefix}, its outputs")


def _quantize(job: LayerJob) -> LayerReport:
    job.safe_point(job.layer.attention_module)
    found = run_original(job)
    if not bool(found.norm_rms_H.isfinite().all()):
        raise out_of_range(job.layer.norm)
    inputs, added = read_by_mlps(job, job.mlp_inputs, found.routing, found.weights_R)
    folds: list[torch.Tensor] = []
    reports: list[GridReport] = []
    for grid in job.grids:
        report = GridReport()
        norm_fold, norm_scales_H = search_norm_fold(job, grid, inputs, found.norm_rms_H)
        if job.ranks.first:
            _quantize_dense_part(job, grid, found.attention_moments, norm_fold, report)
            if norm_fold.rows:
                job.keep_scales(grid, job.layer.norm, norm_scales_H)
        folds.append(norm_scales_H)
        reports.append(report)
    outcomes = quantize_mlps(job, inputs, folds, found.routing)
    reports = job.ranks.once(lambda: reports)
    for place, report in enumerate(reports):
        sum_up(report, [of_grids[place] for of_grids in outcomes])
    counts = found.routing.counts(len(job.layer.experts)).tolist() if found.routing else []
    return LayerReport(counts, {expert: len(rows_R) for expert, rows_R in added.items()}, reports)


@dataclass(frozen=True)
class OriginalRun:
    """What the original's dense part has shown."""

    attention_moments: dict[ScaleGroup, InputMoments]
    """Of attention's inputs, on rank 0; elsewhere all zero, unless they were wanted everywhere."""
    norm_rms_H: torch.Tensor
    """The root mean square of the MLPs' input."""
    weights_R: torch.Tensor
    """The `token_weights`."""
    routing: Routing | None


def run_original(job: LayerJob, moments_everywhere: bool = False) -> OriginalRun:
    """Runs the original's dense part: fills `outputs`, still without experts, and `mlp_inputs`; collects statistics.

    Rank 0 alone gets attention's, or with `moments_everywhere` all ranks.
    """
    device, ranks, shares = job.weights.device, job.ranks, job.shares
    num_tokens, own = job.inputs.shape[1], shares.samples(job.ranks.rank)
    statistics = {
        group: SampleStatistics(
            job, job.weights.shape(f"{group.consumers[0]}.weight")[1], job.compensates(group.consumers[0])
        )
        for group in job.layer.attention
        if job.anywhere(group.consumers[0])
    }
    norm_statistics = SampleStatistics(job, job.inputs.shape[2])
    observers: dict[str, Observer] = {
        group.consumers[0]: group_statistics.add for group, group_statistics in statistics.items()
    }
    record = job.mlp_inputs.recorder(own[0] * num_tokens)
    chunk_ends = {stop for _, stop in shares.chunks(ranks.rank)}

    def note_mlp_inputs(inputs_RH: torch.Tensor) -> None:
        record(inputs_RH)
        norm_statistics.add(inputs_RH)

    squares: list[torch.Tensor] = []

    def after_batch(stop: int, outputs_NTH: torch.Tensor) -> None:
        squares.append(mean_squares(outputs_NTH))
        for collected in (*statistics.values(), norm_statistics):
            if stop in chunk_ends:
                collected.end_chunk()

    observers[job.layer.mlp_module] = note_mlp_inputs
    stream = Stream(job.weights, job.inputs, job.outputs)
    routing = None
    if own[0] < own[1]:
        with fast_matmuls(device):
            routing = run_dense_part(job.skeleton, job.layer, stream, job.batch_samples, observers, own, after_batch)
    moments = {group: found.moments(num_tokens, moments_everywhere) for group, found in statistics.items()}
    norm_rms_H = norm_statistics.moments(num_tokens).rms_I
    ranks.broadcast(norm_rms_H)
    share_rows(job.mlp_inputs, ranks, shares)
    return OriginalRun(
        moments, norm_rms_H, token_weights(squares, ranks, device), share_routing(routing, ranks, device)
    )


def _quantize_dense_part(
    job: LayerJob, grid: Scheme, moments: dict[ScaleGroup, InputMoments], norm_fold: Fold, report: GridReport
) -> None:
    """Quantizes attention and emits everything that changes outside the MLPs."""
    attention = quantize_attention(job, grid, moments, report)
    if grid.noted:
        note_attention(job, grid, moments, attention.scales)
    emit_dense_part(job, grid, attention, norm_fold, report)
    for group, scales_I in attention.scales.items():
        job.keep_scales(grid, group.producer, scales_I)


def emit_dense_part(
    job: LayerJob, grid: Scheme, attention: AttentionResult, norm_fold: Fold, report: GridReport
) -> None:
    """Proves that the folds change nothing, then emits what changed outside the MLPs."""
    fold = Fold()
    fold.update(attention.fold)
    fold.update(norm_fold)
    weights = ResidentWeights(job.weights)
    folded = FoldedWeights(weights, fold)
    wanted, wanted_routing = few_samples(job, weights)
    found, found_routing = few_samples(job, folded)
    prove_same(job.layer.prefix, wanted, found)
    if wanted_routing is not None and found_routing is not None:
        same = torch.equal(wanted_routing.expert_RK.sort(1).values, found_routing.expert_RK.sort(1).values)
        assert same, f"{job.layer.prefix}: folding the scales changed the routing; please report this"
    in_mlps = {f"{linear}.weight" for mlp in job.layer.mlps for linear in mlp.linears}
    emitted = {linear: weight for linear, weight in attention.linears.items() if job.rounds(grid, linear)}
    for linear, weight in emitted.items():
        job.emit(grid, linear, weight)
        report.weight_errors[linear] = float(weight.relative_error(folded[f"{linear}.weight"]))
    for name in dict.fromkeys((*fold.rows, *fold.columns)):
        if name not in in_mlps and name.removesuffix(".weight") not in emitted:
            job.emit(grid, name, folded[name])


def sum_up(report: GridReport, outcomes: list[MlpOutcome]) -> None:
    """Takes what MLPs cost on a grid into its report."""
    for outcome in outcomes:
        report.weight_errors |= outcome.weight_errors
    results = [outcome.errors for outcome in outcomes if outcome.errors is not None]
    if not results:
        return
    energy = sum(result.energy for result in results) or 1.0
    report.mlp_error = sum(result.error * result.energy for result in results) / energy
    report.mlp_error_plain = sum(result.error_plain * result.energy for result in results) / energy
    report.fallbacks += [result.name for result in results if result.plain]
