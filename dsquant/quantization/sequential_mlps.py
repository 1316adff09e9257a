"""Takes a layer's MLPs through memory and rounds them for the quantized model's inputs (`sequential`).

Gate and up are rounded first, then down for their outputs. Every MLP's outputs are added to the hidden states of
both models while it is in memory.

Shape legend: H hidden size, W width of the MLP, R tokens.
"""

from collections.abc import Mapping

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.layer_mlps import MLPS_AHEAD, MlpOutcome
from dsquant.quantization.mlp import LoadedMlp, MlpResult, RoundedMlp, judged, scaled, search_up_scales
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.pairs import PairMoments, PairStatistics
from dsquant.quantization.statistics import InputMoments, InputStatistics

Tokens = tuple[torch.Tensor, torch.Tensor]
"""The rows that reach an MLP and its share in each, int64 and float32 [R]."""


def quantize_mlps(
    job: LayerJob,
    inputs: Mapping[Mlp, MlpInputs],
    norm_scales_H: torch.Tensor,
    routings: tuple[Routing | None, Routing | None],
) -> list[MlpOutcome]:
    """Runs a layer's MLPs in both models, quantizes and emits them one after the other.

    The job has `quantized` and one grid; `inputs` are the MLPs' in the quantized model, `routings` the original's and
    the quantized model's.
    """
    (grid,), quantized, outcomes = job.grids, job.quantized, []
    assert quantized is not None
    for number, mlp in enumerate(job.layer.mlps):
        job.safe_point(mlp.up.rsplit(".", 1)[0])
        original = GatedWeights.read(job.weights, mlp)
        ahead = job.layer.mlps[number + 1 :][:MLPS_AHEAD]
        job.weights.prefetch([f"{linear}.weight" for one in ahead for linear in one.linears])
        result = _quantize_mlp(job, LoadedMlp(mlp, original, inputs[mlp], job.seed + number), norm_scales_H)
        outcomes.append(MlpOutcome(result.errors, result.weight_errors))
        for linear, weight in zip(mlp.linears, result.rounded.linears, strict=True):
            job.emit(grid, linear, weight)
        if not result.errors.plain:
            job.keep_scales(grid, mlp.up, result.rounded.up_scales_W)
        of_original, of_quantized = (_tokens(job, mlp, routing) for routing in routings)
        if mlp.expert is not None:  # transformers' own forward has added what others put out
            _add_outputs(job, original, (job.mlp_inputs, job.outputs), of_original)
        streams = quantized.mlp_inputs, quantized.outputs
        _add_outputs(job, result.rounded.dequantized(), streams, of_quantized, norm_scales_H)
    return outcomes


def _quantize_mlp(job: LayerJob, loaded: LoadedMlp, norm_scales_H: torch.Tensor) -> MlpResult:
    (grid,), original, steps = job.grids, loaded.original, job.steps
    of_input, unrounded_hidden = _input_moments(job, loaded)
    up_scales_W = search_up_scales(original, unrounded_hidden, grid, steps)
    folded, of_input = scaled(original, norm_scales_H, up_scales_W), of_input.divided(norm_scales_H)
    gate, up = of_input.rounded([folded.gate_WH, folded.up_WH], grid, steps)
    rounded = GatedWeights(gate.dequantize(), up.dequantize(), folded.down_HW)
    of_hidden = _hidden_moments(job, loaded, rounded, norm_scales_H, up_scales_W)
    (down,) = of_hidden.rounded([folded.down_HW], grid, steps)
    proposed = RoundedMlp(folded, (gate, up, down), (of_input.moments, of_hidden.moments), up_scales_W)
    return judged(job, loaded, proposed, norm_scales_H, grid)


def _input_moments(job: LayerJob, loaded: LoadedMlp) -> tuple[PairMoments, InputMoments]:
    """Returns the moments of the MLP's input; and of down's, were gate and up not rounded."""
    original, inputs, device = loaded.original, loaded.inputs, job.weights.device
    pairs = PairStatistics(job.inputs.shape[2], loaded.seed, device)
    hidden = InputStatistics(len(original.up_WH), loaded.seed, device)
    with fast_matmuls(device):
        for rows_R, weights_R in inputs.parts():
            inputs_RH = inputs.activations.rows(rows_R)
            pairs.add(job.mlp_inputs.rows(rows_R), inputs_RH, weights_R)
            hidden.add(original.hidden(job.skeleton, inputs_RH), weights_R)
    return pairs.moments(), hidden.moments()


def _hidden_moments(
    job: LayerJob, loaded: LoadedMlp, rounded: GatedWeights, norm_scales_H: torch.Tensor, up_scales_W: torch.Tensor
) -> PairMoments:
    """Returns the moments of down's input behind rounded gate and up, under the scales."""
    pairs = PairStatistics(len(up_scales_W), loaded.seed, job.weights.device)
    with fast_matmuls(job.weights.device):
        for rows_R, weights_R in loaded.inputs.parts():
            original_RW = loaded.original.hidden(job.skeleton, job.mlp_inputs.rows(rows_R)) / up_scales_W
            inputs_RH = loaded.inputs.activations.rows(rows_R) / norm_scales_H
            pairs.add(original_RW, rounded.hidden(job.skeleton, inputs_RH), weights_R)
    return pairs.moments()


def _tokens(job: LayerJob, mlp: Mlp, routing: Routing | None) -> Tokens:
    """Returns all tokens with a share of 1; for an expert, its tokens as they are routed."""
    if mlp.expert is None:
        rows_R = torch.arange(job.mlp_inputs.num_rows, device=job.weights.device)
        return rows_R, torch.ones(len(rows_R), device=job.weights.device)
    assert routing is not None
    return routing.tokens_of(mlp.expert)


def _add_outputs(
    job: LayerJob,
    weights: GatedWeights,
    streams: tuple[Activations, Activations],
    tokens: Tokens,
    scales_H: torch.Tensor | float = 1.0,
) -> None:
    """Adds what an MLP puts out for its tokens to a layer's outputs; its inputs are divided by the scales."""
    mlp_inputs, outputs = streams
    for rows_R, share_R in zip(*(part.split(ROWS_AT_ONCE) for part in tokens), strict=True):
        with fast_matmuls(job.weights.device):
            output_RH = weights.output(job.skeleton, mlp_inputs.rows(rows_R) / scales_H)
        outputs.add_rows(rows_R, output_RH.mul_(share_R.unsqueeze(1)))
