"""Takes a layer's MLPs through memory and rounds them for the quantized model's inputs (`sequential`).

Gate and up are rounded first, then down for their outputs. Every MLP's outputs are added to the hidden states of
all models while it is in memory.

Shape legend: H hidden size, W width of the MLP, R tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.streaming import Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.layer_job import LayerJob, QuantizedStream
from dsquant.quantization.layer_mlps import (
    EmittedMlp,
    MlpOutcome,
    emit_mlp,
    emit_unquantized,
    mlps_in_turns,
    outcomes_of,
)
from dsquant.quantization.mlp import LoadedMlp, MlpResult, RoundedMlp, judged, scaled, search_up_scales
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.mlp_outputs import MlpStream, Tokens, add_outputs
from dsquant.quantization.output_metrics import mlp_metrics
from dsquant.quantization.pairs import PairMoments, PairStatistics, makes_up
from dsquant.quantization.sharing import differences
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True)
class FollowingMlps:
    """A layer's MLPs in the model that is quantized onto one grid."""

    grid: Scheme
    quantized: QuantizedStream
    inputs: Mapping[Mlp, MlpInputs]
    norm_scales_H: torch.Tensor
    """Folded into the norm before the MLPs."""
    routing: Routing | None
    topped_up: Mapping[int, int]
    """Expert -> tokens added to its own."""

    @property
    def stream(self) -> MlpStream:
        """What they read and add to."""
        return MlpStream(self.quantized.mlp_inputs, self.quantized.outputs, self._tokens_of, self.norm_scales_H)

    def _tokens_of(self, mlp: Mlp) -> Tokens:
        """Returns all tokens with a share of 1; for an expert, its tokens as they are routed."""
        if mlp.expert is not None:
            assert self.routing is not None
            return self.routing.tokens_of(mlp.expert)
        rows_R = torch.arange(self.quantized.mlp_inputs.num_rows, device=self.norm_scales_H.device)
        return rows_R, torch.ones(len(rows_R), device=rows_R.device)


def quantize_mlps(
    job: LayerJob, original_routing: Routing | None, following: Sequence[FollowingMlps]
) -> list[list[MlpOutcome]]:
    """Runs a layer's MLPs in all models, quantizes and emits them; each rank has one of them at a time.

    The one that is always read comes first, before any expert's outputs are added: it makes up for what hidden states
    lack. Returns the outcomes by MLP and grid, on every rank.
    """
    mlps, own = job.layer.mlps, list[list[EmittedMlp | None]]()
    behind = [
        differences(job, model.quantized.outputs)
        if mlps[0].expert is None and makes_up(job, model.grid, mlps[0].down)
        else None
        for model in following
    ]
    for number, turn, original in mlps_in_turns(job, original_routing):
        emitted: list[EmittedMlp | None] = []
        metrics = [] if original is None else mlp_metrics(job, mlps[number], original, original_routing)
        for place, model in enumerate(following):
            weights = None
            if original is not None:
                lack = behind[place] if mlps[number].expert is None else None
                loaded = LoadedMlp(mlps[number], original, model.inputs[mlps[number]], job.seed + number, lack)
                one, weights = _emitted(job, loaded, model, metrics)
                emitted.append(one)
            add_outputs(job, turn, weights, model.stream)
        behind = [None for _ in following]  # outputs have been added
        if original is not None:
            own.append(emitted)
    return job.ranks.in_turns(outcomes_of(job, own), len(mlps))


def _emitted(
    job: LayerJob, loaded: LoadedMlp, model: FollowingMlps, metrics: Sequence[torch.Tensor | None]
) -> tuple[EmittedMlp | None, GatedWeights]:
    """Quantizes an MLP and emits it, None where it is not quantized; returns the weights that the quantized model has,
    too.

    `metrics` are those of what gate, up and down put out.
    """
    grid = model.grid
    if loaded.mlp.up not in job.linears[grid]:
        return None, emit_unquantized(job, grid, loaded, model.norm_scales_H)
    result = _quantize_mlp(job, loaded, model.norm_scales_H, grid, metrics)
    return emit_mlp(job, grid, loaded.mlp, result), _passed_on(
        job, grid, loaded.mlp, result.rounded.folded, result.rounded.linears
    )


def _quantize_mlp(
    job: LayerJob,
    loaded: LoadedMlp,
    norm_scales_H: torch.Tensor,
    grid: Scheme,
    metrics: Sequence[torch.Tensor | None],
) -> MlpResult:
    original, steps = loaded.original, job.steps
    of_gate, of_up, of_down = (job.grid_of(grid, linear) for linear in loaded.mlp.linears)
    of_input, unrounded_hidden = _input_moments(job, loaded)
    up_scales_W = search_up_scales(original, unrounded_hidden, grid, steps)
    folded, of_input = scaled(original, norm_scales_H, up_scales_W), of_input.divided(norm_scales_H)
    metric_of_gate, metric_of_up, metric_of_down = metrics
    if metric_of_up is not None:  # an error of up's scaled rows is as many times as large in what it puts out
        metric_of_up = metric_of_up * up_scales_W * up_scales_W.unsqueeze(1)
    of_both = [metric_of_gate, metric_of_up]
    gate, up = of_input.rounded([folded.gate_WH, folded.up_WH], [of_gate, of_up], steps, of_both)
    upper = _passed_on(job, grid, loaded.mlp, folded, (gate, up))
    of_hidden = _hidden_moments(job, loaded, upper, norm_scales_H, up_scales_W)
    (down,) = of_hidden.rounded([folded.down_HW], [of_down], steps, [metric_of_down])
    proposed = RoundedMlp(folded, (gate, up, down), (of_input.moments, of_hidden.moments), up_scales_W)
    return judged(job, loaded, proposed, norm_scales_H, grid)


def _passed_on(
    job: LayerJob, grid: Scheme, mlp: Mlp, folded: GatedWeights, rounded: Sequence[QuantizedWeight]
) -> GatedWeights:
    """Returns what the quantized model computes with: those rounded so far, and folded weights for the rest."""
    found = list(folded.parts)
    for place, weight in enumerate(rounded):
        if job.rounds(grid, mlp.linears[place]):
            found[place] = weight.dequantize()
    return GatedWeights(*found)


def _input_moments(job: LayerJob, loaded: LoadedMlp) -> tuple[PairMoments, InputMoments]:
    """Returns the moments of the MLP's input; and of down's, were gate and up not rounded."""
    original, inputs, device = loaded.original, loaded.inputs, job.weights.device
    pairs = PairStatistics(job.inputs.shape[2], loaded.seed, device, len(inputs.rows_R))
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
            original_RW = loaded.original.hidden(job.skeleton, job.mlp_inputs.rows(rows_R))
            lack_RH = loaded.lack(rows_R, original_RW)
            inputs_RH = loaded.inputs.activations.rows(rows_R) / norm_scales_H
            pairs.add(original_RW / up_scales_W, rounded.hidden(job.skeleton, inputs_RH), weights_R, lack_RH)
    return pairs.moments()
