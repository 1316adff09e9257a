"""Takes a layer's MLPs through memory, one at a time on each rank: run, quantized, emitted.

Shape legend: H hidden size, R tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.compensate import with_inverses
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.mlp import LoadedMlp, MlpErrors, quantize_mlp, scaled
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.sharing import exchange_contributions
from dsquant.quantization.statistics import InputMoments, InputStatistics, InverseFactor, is_wide
from dsquant.schemes import Grid

# Experts that are read from disk while one is computed.
MLPS_AHEAD = 2
# The Gram matrix that a layer's MLPs share is of at most this many tokens, evenly spaced.
SHARED_ROWS = 2**16


@dataclass(frozen=True)
class MlpOutcome:
    """The cost of quantizing an MLP onto one grid; nothing where it is not quantized."""

    errors: MlpErrors | None = None
    weight_errors: dict[str, float] = field(default_factory=dict)


def quantize_mlps(
    job: LayerJob, inputs: dict[Mlp, MlpInputs], norm_scales: list[torch.Tensor], routing: Routing | None
) -> list[list[MlpOutcome]]:
    """Runs the original's MLPs, quantizes them onto every grid and emits them; each rank has one of them at a time.

    `norm_scales` are those folded into the norm before the MLPs, float32 [H], by grid. Returns the outcomes by MLP and
    grid, on every rank.
    """
    mlps, inverses = job.layer.mlps, shared_inverses(job, norm_scales)
    loaded = (
        LoadedMlp(mlps[number], original, inputs[mlps[number]], job.seed + number)
        for number, original in own_mlps(job, routing)
    )
    own = [_quantize_mlp(job, one, norm_scales, inverses) for one in loaded]
    return job.ranks.in_turns(own, len(mlps))


def own_mlps(job: LayerJob, routing: Routing | None) -> Iterator[tuple[int, GatedWeights]]:
    """Reads the MLPs, of which each rank has one at a time, and adds what experts contribute to the layer's outputs.

    Yields the numbers and weights of this rank's; every rank has to consume all of its own.
    """
    mlps, ranks = job.layer.mlps, job.ranks
    for begin in range(0, len(mlps), ranks.size):
        number, original = begin + ranks.rank, None
        if number < len(mlps):
            job.safe_point(mlps[number].up.rsplit(".", 1)[0])
            original = GatedWeights.read(job.weights, mlps[number])
            ahead = mlps[number + ranks.size :: ranks.size][:MLPS_AHEAD]
            job.weights.prefetch([f"{linear}.weight" for mlp in ahead for linear in mlp.linears])
        if routing is not None:
            _add_contributions(job, mlps[begin : begin + ranks.size], original, routing)
        if original is not None:
            yield number, original


def _quantize_mlp(
    job: LayerJob, loaded: LoadedMlp, norm_scales: list[torch.Tensor], inverses: list[tuple[InverseFactor, ...]]
) -> list[MlpOutcome]:
    """Quantizes one MLP onto every grid and emits it; returns what it cost on each grid."""
    mlp, original, outcomes = loaded.mlp, loaded.original, list[MlpOutcome]()
    moments = moments_of(job, mlp, original, loaded.inputs, loaded.seed) if job.anywhere(mlp.up) else None
    for grid, norm_scales_H, shared in zip(job.grids, norm_scales, inverses, strict=True):
        if moments is None or mlp.up not in job.linears[grid]:
            if job.linears[grid]:
                unscaled = scaled(original, norm_scales_H, original.up_WH.new_ones(len(original.up_WH)))
                _emit_folded(job, grid, mlp, unscaled)
            outcomes.append(MlpOutcome())
            continue
        under_norm = replace(moments[0].divided(norm_scales_H), inverses=shared)
        result = quantize_mlp(job, loaded, (under_norm, moments[1]), norm_scales_H, grid)
        outcomes.append(MlpOutcome(result.errors, result.weight_errors if grid.rounded else {}))
        if not result.errors.plain:
            job.keep_scales(grid, mlp.up, result.rounded.up_scales_W)
        if grid.rounded:
            for linear, quantized in zip(mlp.linears, result.rounded.linears, strict=True):
                job.emit(grid, linear, quantized)
            continue
        of_input, of_hidden = (part.importance for part in result.rounded.moments)
        for linear, importance in zip(mlp.linears, (of_input, of_input, of_hidden), strict=True):
            job.note(grid, linear, importance)
        _emit_folded(job, grid, mlp, result.rounded.folded)
    return outcomes


def _emit_folded(job: LayerJob, grid: Grid, mlp: Mlp, folded: GatedWeights) -> None:
    for linear, weight in zip(mlp.linears, folded.parts, strict=True):
        job.emit(grid, f"{linear}.weight", weight)


def _add_contributions(job: LayerJob, turn: Sequence[Mlp], original: GatedWeights | None, routing: Routing) -> None:
    """Adds what a turn's experts, one for each rank, contribute to the outputs of the tokens that reach them."""
    expert = None if original is None else turn[job.ranks.rank].expert
    parts = _contribution(job, original, *routing.tokens_of(expert)) if original and expert is not None else iter(())
    if job.ranks.size == 1:
        for part_R, output_RH in parts:
            job.outputs.add_rows(part_R, output_RH)
        return
    none_RH = torch.empty(0, job.inputs.shape[2], device=job.weights.device)
    own_RH = torch.cat([none_RH, *(output_RH for _, output_RH in parts)])
    exchange_contributions(job, turn, own_RH, routing)


def _contribution(
    job: LayerJob, original: GatedWeights, rows_R: torch.Tensor, share_R: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for part_R, part_share_R in zip(rows_R.split(ROWS_AT_ONCE), share_R.split(ROWS_AT_ONCE), strict=True):
        with fast_matmuls(job.weights.device):
            output_RH = original.output(job.skeleton, job.mlp_inputs.rows(part_R))
        yield part_R, output_RH.mul_(part_share_R.unsqueeze(1))


def shared_inverses(job: LayerJob, norm_scales: Sequence[torch.Tensor]) -> list[tuple[InverseFactor, ...]]:
    """Computes the factors that compensate errors of gate and up where inputs are too wide for one Gram matrix each.

    All MLPs share that of the layer's tokens in `mlp_inputs`, or of `SHARED_ROWS` of them (docs/decisions/0018).
    Returns one entry for each grid; empty where MLPs have their own, or errors are not compensated.
    """
    hidden, mlp_inputs = job.inputs.shape[2], job.mlp_inputs
    wanted = [grid.rounded and any(mlp.up in job.linears[grid] for mlp in job.layer.mlps) for grid in job.grids]
    if not is_wide(hidden) or "compensate" not in job.steps or not any(wanted):
        return [() for _ in wanted]
    statistics = InputStatistics(hidden, job.seed, job.weights.device, compensated=True)
    step = -(-mlp_inputs.num_rows // SHARED_ROWS)
    with fast_matmuls(job.weights.device):
        for rows_R in torch.arange(0, mlp_inputs.num_rows, step, device=job.weights.device).split(ROWS_AT_ONCE):
            statistics.add(mlp_inputs.rows(rows_R))
    moments = statistics.moments()
    return [
        with_inverses(moments.divided(scales_H), grid).inverses if asked else ()
        for grid, scales_H, asked in zip(job.grids, norm_scales, wanted, strict=True)
    ]


def moments_of(
    job: LayerJob, mlp: Mlp, original: GatedWeights, inputs: MlpInputs, seed: int
) -> tuple[InputMoments, InputMoments]:
    """Returns the moments of an MLP's input and of its down projection's input, of the tokens it is judged on."""
    compensated = job.compensates(mlp.down)
    of_input = InputStatistics(job.inputs.shape[2], seed, job.weights.device)
    of_hidden = InputStatistics(len(original.up_WH), seed, job.weights.device, compensated=compensated)
    with fast_matmuls(job.weights.device):
        for rows_R, weights_R in inputs.parts():
            inputs_RH = inputs.activations.rows(rows_R)
            of_input.add(inputs_RH, weights_R)
            of_hidden.add(original.hidden(job.skeleton, inputs_RH), weights_R)
    return of_input.moments(), of_hidden.moments()
