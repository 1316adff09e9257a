"""How a layer's MLPs pass through memory where they are rounded for the quantized model's inputs (`successive`).

Gate and up are rounded first, then down for what they put out. Every MLP's outputs are added to the hidden states of
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
from dsquant.quantization.layer_job import LayerJob, QuantizedStream
from dsquant.quantization.layer_mlps import MLPS_AHEAD, MlpOutcome
from dsquant.quantization.mlp import (
    MlpInputs,
    MlpResult,
    RoundedMlp,
    judged,
    scaled,
    search_up_scales,
)
from dsquant.quantization.pairs import PairMoments, PairStatistics
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.schemes import Grid
from dsquant.source.weights import Weights


def quantize_mlps(
    job: LayerJob,
    quantized: QuantizedStream,
    grid: Grid,
    inputs: Mapping[Mlp, MlpInputs],
    norm_scales_H: torch.Tensor,
    routings: tuple[Routing | None, Routing | None],
) -> list[MlpOutcome]:
    """Runs a layer's MLPs in both models, quantizes and emits them one after the other.

    Args:
        job: the layer and its surroundings.
        quantized: the quantized model's hidden states.
        grid: the quantization grid.
        inputs: what each MLP reads in the quantized model.
        norm_scales_H: the scales folded into the norm before the MLPs, float32 [H].
        routings: of the original and the quantized model; None where the layer has no experts.

    Returns:
        By MLP, what it cost.
    """
    outcomes = []
    for number, mlp in enumerate(job.layer.mlps):
        job.safe_point(mlp.up.rsplit(".", 1)[0])
        original = GatedWeights.read(job.weights, mlp)
        _prefetch(job.weights, job.layer.mlps[number + 1 :][:MLPS_AHEAD])
        pairs = _Pairs(job, quantized, original, inputs[mlp], job.seed + number)
        result = _quantize_mlp(pairs, mlp, norm_scales_H, grid)
        outcomes.append(MlpOutcome(result.errors, result.weight_errors))
        for linear, weight in result.linears.items():
            job.emit(grid, linear, weight)
        if not result.errors.plain:
            job.keep_scales(grid, mlp.up, result.up_scales_W)
        _add_contributions(pairs, mlp, result, norm_scales_H, routings)
    return outcomes


def _prefetch(weights: Weights, mlps: tuple[Mlp, ...]) -> None:
    weights.prefetch([f"{linear}.weight" for mlp in mlps for linear in mlp.linears])


class _Pairs:
    """What an MLP reads in both models, and its own weights."""

    def __init__(
        self, job: LayerJob, quantized: QuantizedStream, original: GatedWeights, inputs: MlpInputs, seed: int
    ) -> None:
        self.job, self.quantized, self.original, self.inputs, self.seed = job, quantized, original, inputs, seed

    def of_input(self) -> tuple[PairMoments, InputMoments]:
        """The moments of the MLP's input; and of down's, were gate and up not rounded."""
        width, device = len(self.original.up_WH), self.job.weights.device
        pairs = PairStatistics(self.job.inputs.shape[2], self.seed, device)
        hidden = InputStatistics(width, self.seed, device)
        with fast_matmuls(device):
            for rows_R, weights_R in self.inputs.parts():
                inputs_RH = self.quantized.mlp_inputs.rows(rows_R)
                pairs.add(self.job.mlp_inputs.rows(rows_R), inputs_RH, weights_R)
                hidden.add(self.original.hidden(self.job.skeleton, inputs_RH), weights_R)
        return pairs.moments(), hidden.moments()

    def of_hidden(self, rounded: GatedWeights, norm_scales_H: torch.Tensor, up_scales_W: torch.Tensor) -> PairMoments:
        """The moments of down's input behind rounded gate and up, under the scales."""
        pairs = PairStatistics(len(up_scales_W), self.seed, self.job.weights.device)
        with fast_matmuls(self.job.weights.device):
            for rows_R, weights_R in self.inputs.parts():
                original_RW = self.original.hidden(self.job.skeleton, self.job.mlp_inputs.rows(rows_R)) / up_scales_W
                inputs_RH = self.quantized.mlp_inputs.rows(rows_R) / norm_scales_H
                pairs.add(original_RW, rounded.hidden(self.job.skeleton, inputs_RH), weights_R)
        return pairs.moments()

    def few(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A few tokens' inputs in the original and in the quantized model, float32 [R, H]."""
        original = MlpInputs(self.job.mlp_inputs, self.inputs.rows_R)
        return original.few(), self.inputs.few()


def _quantize_mlp(pairs: _Pairs, mlp: Mlp, norm_scales_H: torch.Tensor, grid: Grid) -> MlpResult:
    original, steps = pairs.original, pairs.job.steps
    of_input, unrounded_hidden = pairs.of_input()
    up_scales_W = search_up_scales(original, unrounded_hidden, grid, steps)
    folded, of_input = scaled(original, norm_scales_H, up_scales_W), of_input.divided(norm_scales_H)
    gate, up = of_input.rounded([folded.gate_WH, folded.up_WH], grid, steps)
    rounded = GatedWeights(gate.dequantize(), up.dequantize(), folded.down_HW)
    of_hidden = pairs.of_hidden(rounded, norm_scales_H, up_scales_W)
    (down,) = of_hidden.rounded([folded.down_HW], grid, steps)
    proposed = RoundedMlp(folded, (gate, up, down), (of_input.moments, of_hidden.moments), up_scales_W)
    num_rows, skeleton = len(pairs.inputs.rows_R), pairs.job.skeleton
    return judged(skeleton, mlp, original, proposed, *pairs.few(), num_rows, norm_scales_H, grid)


def _add_contributions(
    pairs: _Pairs,
    mlp: Mlp,
    result: MlpResult,
    norm_scales_H: torch.Tensor,
    routings: tuple[Routing | None, Routing | None],
) -> None:
    """Adds what the MLP puts out to both models' hidden states.

    Transformers' own forward has added what an always-read MLP puts out in the original.
    """
    job, quantized = pairs.job, pairs.quantized
    of_original, of_quantized = routings
    if mlp.expert is not None:
        _add(job, pairs.original, mlp, (job.mlp_inputs, job.outputs), of_original, 1.0)
    rounded = GatedWeights(*(weight.dequantize() for weight in result.linears.values()))
    _add(job, rounded, mlp, (quantized.mlp_inputs, quantized.outputs), of_quantized, norm_scales_H)


def _add(
    job: LayerJob,
    weights: GatedWeights,
    mlp: Mlp,
    stream: tuple[Activations, Activations],
    routing: Routing | None,
    scales_H: torch.Tensor | float,
) -> None:
    mlp_inputs, outputs = stream
    if mlp.expert is None:
        rows_R = torch.arange(mlp_inputs.num_rows, device=job.weights.device)
        share_R = torch.ones(len(rows_R), device=job.weights.device)
    else:
        assert routing is not None
        rows_R, share_R = routing.tokens_of(mlp.expert)
    for part_R, part_share_R in zip(rows_R.split(ROWS_AT_ONCE), share_R.split(ROWS_AT_ONCE), strict=True):
        with fast_matmuls(job.weights.device):
            output_RH = weights.output(job.skeleton, mlp_inputs.rows(part_R) / scales_H)
        outputs.add_rows(part_R, output_RH.mul_(part_share_R.unsqueeze(1)))
