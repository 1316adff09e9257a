"""How much a layer's output errs when one group of its linears is rounded at one width, the rest left as it is.

Weights are rounded as the job will round them, under the scales of its grid, on fewer samples. Errors are summed
squares in the hidden states between layers, so those of all groups and layers add up and compare. Experts' errors are
added as if they were independent, as rounding errors of different weights nearly are.

Shape legend: R tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import FoldedWeights, ReplacedWeights, ResidentWeights
from dsquant.model.streaming import Routing
from dsquant.model.structure import Mlp, ScaleGroup
from dsquant.quantization.attention import search_scales, under_scales
from dsquant.quantization.layer import few_samples, inputs_of, out_of_range, run_original, search_norm_fold
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.layer_mlps import MLPS_AHEAD, add_contributions, moments_of
from dsquant.quantization.mlp import CHECK_ROWS, MlpInputs, rounded_linears, scaled, search_up_scales
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import rounded_weight
from dsquant.rounding import UNQUANTIZED, Grid

Errors = dict[str, dict[int, float]]
"""Group -> width -> summed squared error of the layer's output."""


@dataclass(frozen=True)
class Sensitivity:
    """What a layer's groups cost."""

    errors: Errors
    energy: float
    """Summed squares of the layer's outputs."""


def measure_layer(job: LayerJob, groups: Mapping[str, Sequence[str]], widths: Sequence[int]) -> Sensitivity:
    """Runs the original layer, and rounds every group at every width while its weights are in memory.

    Args:
        job: the layer and its surroundings, with one grid; `emit` is not called.
        groups: name -> linears; a group is one attention scale group, one MLP, or all routed experts.
        widths: bits of a code; 16 is unquantized, which costs nothing.

    Returns:
        The groups' errors. The layer's outputs are in `job.outputs` then.

    Raises:
        InputError: where the original's hidden states are not finite.
    """
    (grid,) = job.grids
    grids = [grid.with_bits(width) for width in widths if width != UNQUANTIZED]
    errors: Errors = {name: dict.fromkeys(widths, 0.0) for name in groups}
    group_of = {linear: name for name, linears in groups.items() for linear in linears}
    moments, norm_rms_H, routing = run_original(job)
    if not bool(norm_rms_H.isfinite().all()):
        raise out_of_range(job.layer.norm)
    own = {group: found for group, found in moments.items() if group.consumers[0] in group_of}
    for linear, width, error in _attention_errors(job, own, grid, grids):
        errors[group_of[linear]][width] += error
    inputs = {mlp: inputs_of(job.mlp_inputs, mlp, routing, {}, job.steps) for mlp in job.layer.mlps}
    _, norm_scales_H = search_norm_fold(job, grid, inputs, norm_rms_H)
    for number, mlp in enumerate(job.layer.mlps):
        job.safe_point(mlp.up.rsplit(".", 1)[0])
        original = GatedWeights.read(job.weights, mlp)
        ahead = job.layer.mlps[number + 1 :][:MLPS_AHEAD]
        job.weights.prefetch([f"{linear}.weight" for other in ahead for linear in other.linears])
        if routing is not None:
            add_contributions(job, [mlp], original, routing)
        if mlp.up not in group_of or not len(inputs[mlp].rows_R):
            continue
        found = moments_of(job, original, inputs[mlp], job.seed + number)
        for width, error in _mlp_errors(job, mlp, original, inputs[mlp], found, routing, norm_scales_H, grid, grids):
            errors[group_of[mlp.up]][width] += error
    return Sensitivity(errors, _energy(job))


def _energy(job: LayerJob) -> float:
    energy = 0.0
    for start in range(0, job.outputs.shape[0], job.batch_samples):
        part = job.outputs.samples(start, min(start + job.batch_samples, job.outputs.shape[0]))
        energy += float(part.square().sum(dtype=torch.float64))
    if not torch.tensor(energy).isfinite():
        raise out_of_range(f"{job.layer.prefix}, its outputs")
    return energy


def _attention_errors(
    job: LayerJob, moments: Mapping[ScaleGroup, InputMoments], grid: Grid, grids: Sequence[Grid]
) -> Iterator[tuple[str, int, float]]:
    """A group's first linear, width, error; on a few samples, as of all."""
    if not moments:
        return
    weights = ResidentWeights(job.weights)
    fold, scales = search_scales(weights, moments, grid, job.steps)
    folded = ResidentWeights(FoldedWeights(weights, fold))
    wanted, _ = few_samples(job, weights)
    for group, found in moments.items():
        job.safe_point(group.consumers[0])
        divided = under_scales(found, scales.get(group))
        for rounding in grids:
            replaced = {
                name: rounded_weight(folded[name], rounding, divided, job.steps).dequantize()
                for name in (f"{linear}.weight" for linear in group.consumers)
            }
            output, _ = few_samples(job, ReplacedWeights(folded, replaced))
            error = float((output - wanted).square().sum(dtype=torch.float64))
            yield group.consumers[0], rounding.bits, error * job.inputs.shape[0] / len(wanted)


def _mlp_errors(
    job: LayerJob,
    mlp: Mlp,
    original: GatedWeights,
    inputs: MlpInputs,
    moments: tuple[InputMoments, InputMoments],
    routing: Routing | None,
    norm_scales_H: torch.Tensor,
    grid: Grid,
    grids: Sequence[Grid],
) -> Iterator[tuple[int, float]]:
    """Width, error; of at most `CHECK_ROWS` tokens, as of all."""
    of_input, of_hidden = moments
    up_scales_W = search_up_scales(original, of_hidden, grid, job.steps)
    folded = scaled(original, norm_scales_H, up_scales_W)
    of_input, of_hidden = of_input.divided(norm_scales_H), of_hidden.divided(up_scales_W)
    step = max(1, -(-len(inputs.rows_R) // CHECK_ROWS))
    inputs_RH = inputs.activations.rows(inputs.rows_R[::step])
    share_R1 = torch.ones(len(inputs_RH), 1, device=inputs_RH.device)
    if mlp.expert is not None and routing is not None:
        share_R1 = routing.tokens_of(mlp.expert)[1][::step].unsqueeze(1)
    with fast_matmuls(inputs_RH.device):
        wanted_RH = original.output(job.skeleton, inputs_RH)
    for rounding in grids:
        linears = rounded_linears(folded, (of_input, of_hidden), rounding, job.steps)
        rounded = (weight.dequantize() for weight in linears)
        with fast_matmuls(inputs_RH.device):
            found_RH = GatedWeights(*rounded).output(job.skeleton, inputs_RH / norm_scales_H)
        error = float(((found_RH - wanted_RH) * share_R1).square().sum(dtype=torch.float64))
        yield rounding.bits, error * len(inputs.rows_R) / len(inputs_RH)
