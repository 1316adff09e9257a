"""Takes a layer's MLPs through memory, one at a time on each rank: run, quantized, emitted.

Shape legend: H hidden size, R tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from dsquant.kernels.graphs import recorded_launches
from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.compensate import with_inverses
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.mlp import LoadedMlp, MlpErrors, MlpFigures, MlpResult, quantize_mlp, scaled
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.mlp_outputs import Contribute, MlpStream, add_outputs, routed_tokens
from dsquant.quantization.statistics import InputMoments, InputStatistics, InverseFactor, is_wide
from dsquant.schemes import Scheme, widest_vectors

# Experts that are read from disk while one is computed.
MLPS_AHEAD = 2
# The Gram matrix that a layer's MLPs share is of at most this many tokens, evenly spaced.
SHARED_ROWS = 2**16


@dataclass(frozen=True)
class MlpOutcome:
    """The cost of quantizing an MLP onto one grid; nothing where it is not quantized."""

    errors: MlpErrors | None = None
    weight_errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EmittedMlp:
    """An MLP that was handed over, quantized onto a grid, and what a GPU has not told of it yet."""

    grid: Scheme
    figures: MlpFigures
    up_scales_W: torch.Tensor

    def told(self, job: LayerJob) -> MlpOutcome:
        """Waits for the figures, and hands over the scales; raises FloatingPointError where the MLP's outputs are not
        finite."""
        mlp = self.figures.mlp
        errors, weight_errors = self.figures.told()
        if not errors.plain:
            job.keep_scales(self.grid, mlp.up, self.up_scales_W)
        return MlpOutcome(
            errors, {linear: weight_errors[linear] for linear in mlp.linears if job.rounds(self.grid, linear)}
        )


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
    return job.ranks.in_turns(outcomes_of(job, own), len(mlps))


def outcomes_of(job: LayerJob, emitted: Sequence[Sequence[EmittedMlp | None]]) -> list[list[MlpOutcome]]:
    """Returns what MLPs cost by MLP and grid, None those that are not quantized: a GPU is waited for after all."""
    return [[MlpOutcome() if one is None else one.told(job) for one in of_grids] for of_grids in emitted]


def own_mlps(
    job: LayerJob, routing: Routing | None, contribute: Contribute | None = None
) -> Iterator[tuple[int, GatedWeights]]:
    """Reads the MLPs, one at a time on each rank, and adds what experts put out, or what `contribute` makes of
    them, to the layer's outputs.

    Yields the numbers and weights of this rank's; every rank has to consume all of its own.
    """
    for number, _, original in mlps_in_turns(job, routing, contribute):
        if original is not None:
            yield number, original


def mlps_in_turns(
    job: LayerJob, routing: Routing | None, contribute: Contribute | None = None
) -> Iterator[tuple[int, Sequence[Mlp], GatedWeights | None]]:
    """Does what `own_mlps` does, and yields every turn on every rank, before its outputs are added: the number of this
    rank's MLP, the turn's MLPs, one for each rank, and the weights of this rank's; None where it has none."""
    mlps, ranks = job.layer.mlps, job.ranks
    with recorded_launches(again=bool(job.layer.experts)):
        for begin in range(0, len(mlps), ranks.size):
            number, original, turn = begin + ranks.rank, None, mlps[begin : begin + ranks.size]
            if number < len(mlps):
                job.safe_point(mlps[number].up.rsplit(".", 1)[0])
                original = GatedWeights.read(job.weights, mlps[number])
                ahead = mlps[number + ranks.size :: ranks.size][:MLPS_AHEAD]
                job.weights.prefetch([f"{linear}.weight" for mlp in ahead for linear in mlp.linears])
            yield number, turn, original
            if routing is not None:
                tokens_of = partial(routed_tokens, routing)
                stream = MlpStream(job.mlp_inputs, job.outputs, tokens_of, contribute=contribute)
                add_outputs(job, turn, original, stream)


def _quantize_mlp(
    job: LayerJob, loaded: LoadedMlp, norm_scales: list[torch.Tensor], inverses: list[tuple[InverseFactor, ...]]
) -> list[EmittedMlp | None]:
    """Quantizes one MLP onto every grid and emits it; None where it is not quantized."""
    mlp, original, emitted = loaded.mlp, loaded.original, list[EmittedMlp | None]()
    moments = moments_of(job, mlp, original, loaded.inputs, loaded.seed) if job.anywhere(mlp.up) else None
    for grid, norm_scales_H, shared in zip(job.grids, norm_scales, inverses, strict=True):
        if moments is None or mlp.up not in job.linears[grid]:
            emit_unquantized(job, grid, loaded, norm_scales_H)
            emitted.append(None)
            continue
        under_norm = replace(moments[0].divided(norm_scales_H), inverses=shared)
        result = quantize_mlp(job, loaded, (under_norm, moments[1]), norm_scales_H, grid)
        emitted.append(emit_mlp(job, grid, mlp, result))
    return emitted


def emit_mlp(job: LayerJob, grid: Scheme, mlp: Mlp, result: MlpResult) -> EmittedMlp:
    """Hands over a quantized MLP, each linear rounded or folded, and the importance of its inputs where the format
    wants to know."""
    rounded = result.rounded
    of_input, of_hidden = rounded.moments
    columns = (mlp.linears, rounded.linears, rounded.folded.parts, (of_input, of_input, of_hidden))
    for linear, quantized, folded, moments in zip(*columns, strict=True):
        if grid.noted:
            job.note(grid, linear, moments.importance)
        if job.rounds(grid, linear):
            job.emit(grid, linear, quantized)
        else:
            job.emit(grid, f"{linear}.weight", folded)
    return EmittedMlp(grid, result.figures, rounded.up_scales_W)


def emit_unquantized(job: LayerJob, grid: Scheme, loaded: LoadedMlp, norm_scales_H: torch.Tensor) -> GatedWeights:
    """Hands over an MLP that is not quantized onto the grid, under the norm's scales; returns its weights."""
    original = loaded.original
    if not job.linears[grid]:  # nothing is folded either
        return original
    folded = scaled(original, norm_scales_H, original.up_WH.new_ones(len(original.up_WH)))
    packed = job.packed.get(grid, frozenset())
    for linear, weight in zip(loaded.mlp.linears, folded.parts, strict=True):
        if linear not in packed:
            job.emit(grid, f"{linear}.weight", weight)
    return folded


def shared_inverses(job: LayerJob, norm_scales: Sequence[torch.Tensor]) -> list[tuple[InverseFactor, ...]]:
    """Computes the factors that compensate errors of gate and up where inputs are too wide for one Gram matrix each.

    All MLPs share that of the layer's tokens in `mlp_inputs`, or of `SHARED_ROWS` of them (docs/decisions/0018).
    Returns one entry for each grid; empty where MLPs have their own, or errors are not compensated.
    """
    hidden, mlp_inputs = job.inputs.shape[2], job.mlp_inputs
    wanted = [_rounded_scheme(job, grid) for grid in job.grids]
    if not is_wide(hidden) or "compensate" not in job.steps or not any(wanted):
        return [() for _ in wanted]
    statistics = InputStatistics(hidden, job.seed, job.weights.device, compensated=True)
    step = -(-mlp_inputs.num_rows // SHARED_ROWS)
    with fast_matmuls(job.weights.device):
        for rows_R in torch.arange(0, mlp_inputs.num_rows, step, device=job.weights.device).split(ROWS_AT_ONCE):
            statistics.add(mlp_inputs.rows(rows_R))
    moments = statistics.moments()
    return [
        with_inverses(moments.divided(scales_H), scheme).inverses if scheme is not None else ()
        for scheme, scales_H in zip(wanted, norm_scales, strict=True)
    ]


def _rounded_scheme(job: LayerJob, grid: Scheme) -> Scheme | None:
    """The one of all that a gate or up is rounded to whose order of columns the others can take."""
    readers = (linear for mlp in job.layer.mlps if mlp.up in job.linears[grid] for linear in (mlp.gate, mlp.up))
    return widest_vectors(job.grid_of(grid, linear) for linear in readers if job.rounds(grid, linear))


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
