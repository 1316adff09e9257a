"""Searches the scales of the norm before a layer's MLPs, which all of them and the router read.

The group's consumers, hundreds of experts, do not fit into memory together: some of them judge for all.

Shape legend: H hidden size, C candidates.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import Fold, fold_of
from dsquant.model.structure import Mlp, gates_and_ups
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.mlp_inputs import MlpInputs
from dsquant.quantization.scale import best_scales, group_candidates, is_kept, rms_of_columns
from dsquant.quantization.statistics import InputMoments
from dsquant.schemes import Scheme, fake_quantize

# The MLPs that judge, and give the candidates the size of their columns: those with the most tokens. Their gates and
# ups are read from disk twice more for it, the first time into memory together, 117 MB each in R1.
JUDGES = 16
# Of these, as many accept the choice by their own outputs, for which they are read a third time and run three times.
ACCEPTED_BY = 8
# Weights that are read from disk while another is taken.
AHEAD = 4


def search_norm_fold(
    job: LayerJob, grid: Scheme, inputs: Mapping[Mlp, MlpInputs], norm_rms_H: torch.Tensor
) -> tuple[Fold, torch.Tensor]:
    """Searches the scales of the norm before the MLPs, by the root mean square of its output over all tokens [H].

    Returns the fold and the scales, float32 [H]; no fold where no MLP is quantized or scaled, and identity there and
    where no candidate is kept.
    """
    group = job.layer.mlp_norm
    identity_H = torch.ones(job.inputs.shape[2], device=job.weights.device)
    readers = [mlp for mlp in job.layer.mlps if mlp.up in job.linears[grid] and len(inputs[mlp].rows_R)]
    if not readers or not job.folds(grid, group):
        return Fold(), identity_H
    judges = sorted(readers, key=lambda mlp: -len(inputs[mlp].rows_R))[:JUDGES]
    columns_H = rms_of_columns(_gates_and_ups(job, judges))
    producer, exact = job.weights[f"{group.producer}.weight"], job.scales_blocks(grid, group)
    scales_CH = group_candidates(group, producer, norm_rms_H, columns_H, exact)
    job.ranks.broadcast(scales_CH)

    def judge(place: int) -> tuple[Sequence[torch.Tensor], InputMoments]:
        moments, size = inputs[judges[place]].moments(job.seed), job.ranks.size
        weights = _gates_and_ups(job, [judges[place]])
        job.weights.prefetch(_names(judges[place + size : place + size + 1]))
        return weights, moments

    scales_H = best_scales(scales_CH, [partial(judge, place) for place in range(len(judges))], grid, job.ranks)
    if not torch.equal(scales_H, identity_H):
        accepting = [(mlp, inputs[mlp]) for mlp in judges[:ACCEPTED_BY]]
        errors = job.ranks.spread(lambda one: _errors(job, grid, *one, scales_H), accepting)
        if not is_kept(*(sum(column) for column in zip(*errors, strict=True))):
            scales_H = identity_H
    return fold_of(job.weights, group, scales_H), scales_H


def _gates_and_ups(job: LayerJob, mlps: Sequence[Mlp]) -> list[torch.Tensor]:
    names, weights = _names(mlps), list[torch.Tensor]()
    for place, name in enumerate(names):
        job.weights.prefetch(names[place + 1 : place + 1 + AHEAD])
        weights.append(job.weights[name])
    return weights


def _names(mlps: Sequence[Mlp]) -> list[str]:
    return [f"{linear}.weight" for linear in gates_and_ups(mlps)]


def _errors(job: LayerJob, grid: Scheme, mlp: Mlp, inputs: MlpInputs, scales_H: torch.Tensor) -> tuple[float, float]:
    """Returns the output error of an MLP with gate and up rounded under the scales, and plainly rounded."""
    original = GatedWeights.read(job.weights, mlp)
    inputs_RH = inputs.few()
    wanted_RH = original.output(job.skeleton, inputs_RH)

    def error(scales_H: torch.Tensor) -> float:
        gate, up = (fake_quantize(weight * scales_H, grid).div_(scales_H) for weight in original.parts[:2])
        found_RH = GatedWeights(gate, up, original.down_HW).output(job.skeleton, inputs_RH)
        return float(inputs.energy_of_few(found_RH - wanted_RH))

    return error(scales_H), error(torch.ones_like(scales_H))
