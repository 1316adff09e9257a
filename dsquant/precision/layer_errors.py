"""How much a layer's output errs when one group of its linears is stored at one width, the rest left as it is.

Weights are stored as the job will store them, under the scales of its grid, on fewer samples. Errors are summed squares
in the hidden states between layers, so those of a layer's groups add up and compare. Experts' errors are added as if
they were independent, as rounding errors of different weights nearly are.

Shape legend: R tokens, H hidden size, W width of an MLP, O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import FoldedWeights, ReplacedWeights, ResidentWeights
from dsquant.model.streaming import Routing
from dsquant.model.structure import DecoderLayer, Mlp, ScaleGroup
from dsquant.precision.allocation import Width
from dsquant.quantization.attention import few_samples, note_attention, search_scales, under_scales
from dsquant.quantization.layer import out_of_range, run_original
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.layer_mlps import MLPS_AHEAD, add_contributions, moments_of, shared_inverses
from dsquant.quantization.mlp import scaled, search_up_scales
from dsquant.quantization.mlp_inputs import CHECK_ROWS, MlpInputs, inputs_of
from dsquant.quantization.mlp_norm import search_norm_fold
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import prepared
from dsquant.schemes import Grid

# At most this many routed experts of a layer, evenly spaced, are stored at each width; they stand for all.
EXPERTS = 32

Store = Callable[[str, Width, str, torch.Tensor, InputMoments], torch.Tensor]
"""Gets a group, a width, one of the group's linears, its weight under the scales [O, I] and the moments of what it
reads; returns what an engine will compute with."""


@dataclass(frozen=True)
class Trial(Generic[Width]):
    """What is tried on a layer."""

    groups: Mapping[str, Sequence[str]]
    """Name -> linears: some that read one input in attention, some of one MLP, or the same of all routed experts."""
    widths: Mapping[str, Sequence[Width]]
    """Group -> the widths to try."""
    store: Store[Width]

    def groups_of(self, linears: Sequence[str]) -> dict[str, list[str]]:
        """The groups that have some of the linears -> those."""
        inside = {name: [one for one in linears if one in members] for name, members in self.groups.items()}
        return {name: members for name, members in inside.items() if members}


Errors = dict[str, dict[Width, float]]
"""Group -> width -> summed squared error."""


@dataclass(frozen=True)
class Sensitivity(Generic[Width]):
    """What a layer's groups cost."""

    errors: Errors[Width]
    """Of the layer's output."""
    energy: float
    """Summed squares of the layer's outputs."""


def measure_layer(job: LayerJob, trial: Trial[Width]) -> Sensitivity[Width]:
    """Runs the original layer, and stores every group at every width while its weights are in memory.

    Args:
        job: the layer and its surroundings, with one grid; `emit` is not called, `note` only for attention.
        trial: the groups and widths.

    Returns:
        The groups' errors. The layer's outputs are in `job.outputs` then.

    Raises:
        InputError: where the original's hidden states are not finite.
    """
    (grid,) = job.grids
    errors: Errors[Width] = {name: dict.fromkeys(trial.widths[name], 0.0) for name in trial.groups}
    moments, norm_rms_H, routing = run_original(job)
    if not bool(norm_rms_H.isfinite().all()):
        raise out_of_range(job.layer.norm)
    for name, width, error in _attention_errors(job, moments, grid, trial):
        errors[name][width] += error
    inputs = {mlp: inputs_of(job.mlp_inputs, mlp, routing, {}, job.steps) for mlp in job.layer.mlps}
    _, norm_scales_H = search_norm_fold(job, grid, inputs, norm_rms_H)
    (inverses,) = shared_inverses(job, [norm_scales_H])
    shares = _experts(job.layer, inputs)
    for number, mlp in enumerate(job.layer.mlps):
        job.safe_point(mlp.up.rsplit(".", 1)[0])
        original = GatedWeights.read(job.weights, mlp)
        ahead = job.layer.mlps[number + 1 :][:MLPS_AHEAD]
        job.weights.prefetch([f"{linear}.weight" for other in ahead for linear in other.linears])
        if routing is not None:
            add_contributions(job, [mlp], original, routing)
        if mlp not in shares or not trial.groups_of(mlp.linears) or not len(inputs[mlp].rows_R):
            continue
        of_input, of_hidden = moments_of(job, mlp, original, inputs[mlp], job.seed + number)
        found = replace(of_input.divided(norm_scales_H), inverses=inverses), of_hidden
        for name, width, error in _mlp_errors(job, mlp, original, inputs[mlp], found, routing, norm_scales_H, trial):
            errors[name][width] += error * shares[mlp]
    return Sensitivity(errors, _energy(job))


def _experts(layer: DecoderLayer, inputs: Mapping[Mlp, MlpInputs]) -> dict[Mlp, float]:
    """The MLPs that are tried -> for how many times its own tokens each stands."""
    measured = layer.experts[:: max(1, -(-len(layer.experts) // EXPERTS))]
    all_tokens, tokens = (sum(len(inputs[mlp].rows_R) for mlp in mlps) for mlps in (layer.experts, measured))
    return {mlp: 1.0 for mlp in layer.mlps if mlp.expert is None} | dict.fromkeys(measured, all_tokens / max(1, tokens))


def _energy(job: LayerJob) -> float:
    energy = 0.0
    for start in range(0, job.outputs.shape[0], job.batch_samples):
        part = job.outputs.samples(start, min(start + job.batch_samples, job.outputs.shape[0]))
        energy += float(part.square().sum(dtype=torch.float64))
    if not torch.tensor(energy).isfinite():
        raise out_of_range(f"{job.layer.prefix}, its outputs")
    return energy


def _attention_errors(
    job: LayerJob, moments: Mapping[ScaleGroup, InputMoments], grid: Grid, trial: Trial[Width]
) -> Iterator[tuple[str, Width, float]]:
    """Group, width, error; on a few samples, as of all."""
    if not moments:
        return
    weights = ResidentWeights(job.weights)
    fold, scales = search_scales(weights, moments, grid, job.steps)
    if not grid.rounded:
        note_attention(job, grid, moments, scales)
    folded = ResidentWeights(FoldedWeights(weights, fold))
    wanted, _ = few_samples(job, weights)
    for group, found in moments.items():
        job.safe_point(group.consumers[0])
        divided = prepared(under_scales(found, scales.get(group)), grid, job.steps)
        for name, linears in trial.groups_of(group.consumers).items():
            for width in trial.widths[name]:
                replaced = {
                    f"{linear}.weight": trial.store(name, width, linear, folded[f"{linear}.weight"], divided)
                    for linear in linears
                }
                output, _ = few_samples(job, ReplacedWeights(folded, replaced))
                error = float((output - wanted).square().sum(dtype=torch.float64))
                yield name, width, error * job.inputs.shape[0] / len(wanted)


def _mlp_errors(
    job: LayerJob,
    mlp: Mlp,
    original: GatedWeights,
    inputs: MlpInputs,
    moments: tuple[InputMoments, InputMoments],
    routing: Routing | None,
    norm_scales_H: torch.Tensor,
    trial: Trial[Width],
) -> Iterator[tuple[str, Width, float]]:
    """Group, width, error; of at most `CHECK_ROWS` tokens, as of all. Only down's moments are not under scales yet."""
    (grid,) = job.grids
    of_input, of_hidden = moments
    up_scales_W = search_up_scales(original, of_hidden, grid, job.steps)
    folded = dict(zip(mlp.linears, scaled(original, norm_scales_H, up_scales_W).parts, strict=True))
    of_input, of_hidden = (prepared(one, grid, job.steps) for one in (of_input, of_hidden.divided(up_scales_W)))
    reads = dict(zip(mlp.linears, (of_input, of_input, of_hidden), strict=True))
    step = max(1, -(-len(inputs.rows_R) // CHECK_ROWS))
    inputs_RH = inputs.activations.rows(inputs.rows_R[::step])
    share_R1 = torch.ones(len(inputs_RH), 1, device=inputs_RH.device)
    if mlp.expert is not None and routing is not None:
        share_R1 = routing.tokens_of(mlp.expert)[1][::step].unsqueeze(1)
    with fast_matmuls(inputs_RH.device):
        wanted_RH = original.output(job.skeleton, inputs_RH)
    for name, linears in trial.groups_of(mlp.linears).items():
        for width in trial.widths[name]:
            stored = {one: trial.store(name, width, one, folded[one], reads[one]) for one in linears}
            with fast_matmuls(inputs_RH.device):
                found_RH = GatedWeights(*(folded | stored).values()).output(job.skeleton, inputs_RH / norm_scales_H)
            error = float(((found_RH - wanted_RH) * share_R1).square().sum(dtype=torch.float64))
            yield name, width, error * len(inputs.rows_R) / len(inputs_RH)
