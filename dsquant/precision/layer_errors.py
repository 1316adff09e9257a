"""Measures what it costs at the model's output when one group of a layer's linears is stored at one width.

Weights are stored as the job will store them, under the scales of its grid, on fewer samples; the rest is unchanged.
What that changes in the hidden states, times their gradient (`model.gradients`), is the KL divergence that it causes,
as far as that grows with the square of an error. So errors of all groups add up and compare. Those of a layer's experts
are added as if they were independent, as rounding errors of different weights nearly are.

Shape legend: R tokens, H hidden size, W width of an MLP, O out features, I in features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from math import prod
from typing import Generic

import torch

from dsquant.formats.wanted import Choosable
from dsquant.jobs.ranks import dealt
from dsquant.kernels.graphs import recorded_launches
from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.gradients import LayerStates
from dsquant.model.overlays import FoldedWeights, ReplacedWeights, ResidentWeights
from dsquant.model.streaming import Routing, Stream, run_dense_part
from dsquant.model.structure import DecoderLayer, Mlp, ScaleGroup
from dsquant.precision.allocation import Width
from dsquant.quantization.attention import fold_scales, note_attention, search_scales, under_scales
from dsquant.quantization.gradient_pass import take_back
from dsquant.quantization.layer import out_of_range, run_original
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.layer_mlps import MLPS_AHEAD, moments_of, shared_inverses
from dsquant.quantization.mlp import scaled, search_up_scales
from dsquant.quantization.mlp_inputs import CHECK_ROWS, MlpInputs, inputs_of
from dsquant.quantization.mlp_norm import search_norm_fold
from dsquant.quantization.statistics import InputMoments, InverseFactor
from dsquant.quantization.steps import prepared
from dsquant.schemes import KEPT_WIDTHS, Scheme
from dsquant.source.weights import Weights

# At most this many routed experts of a layer, evenly spaced, are stored at each width; they stand for all.
EXPERTS = 32
# Attention's errors are measured on at most this many samples.
ATTENTION_SAMPLES = 4

Store = Callable[[Choosable, Width, str, torch.Tensor, InputMoments | None], torch.Tensor]
"""Gets a group, a width, one of the group's linears, its weight under the scales [O, I] and the moments of what it
reads, None for embedding and head, of which rows may come alone; returns what an engine will compute with."""
Errors = dict[Scheme, dict[str, dict[Width, float]]]
"""Grid -> group -> width -> KL divergence from the original, in nats, summed over all tokens."""
_Found = tuple[Scheme, str, Width, float]


@dataclass(frozen=True)
class Trial(Generic[Width]):
    """The groups and widths to try under the scales of one grid."""

    groups: Sequence[Choosable]
    """Linears that read one input in attention, those of one MLP, or the same of all routed experts."""
    store: Store[Width]

    def inside(self, linears: Sequence[str]) -> Iterator[tuple[Choosable, list[str], list[Width]]]:
        """The groups that have some of the linears, with those, and the widths to try."""
        for group in self.groups:
            members = [linear for linear in linears if linear in group.linears]
            if members:
                yield group, members, [width for width in group.num_bytes if width not in KEPT_WIDTHS]


def measure_layer(job: LayerJob, trials: Mapping[Scheme, Trial[Width]], states: LayerStates) -> Errors[Width]:
    """Stores every group of a layer at every width while its weights are in memory, and takes the gradients of its
    outputs back to its inputs.

    `states` are of the job's inputs; `job.outputs` is overwritten, `emit` is not called, `note` only for attention.
    Returns the errors on every rank, 0 where a group is not quantized. Raises InputError where the original's hidden
    states are not finite.
    """
    original = run_original(job, moments_everywhere=True)
    routing, norm_rms_H = original.routing, original.norm_rms_H
    if not bool(norm_rms_H.isfinite().all()):
        raise out_of_range(job.layer.norm)
    inputs = {mlp: inputs_of(job.mlp_inputs, mlp, routing, {}, job.steps) for mlp in job.layer.mlps}
    norm_scales = {grid: search_norm_fold(job, grid, inputs, norm_rms_H)[1] for grid in job.grids}
    inverses = dict(zip(job.grids, shared_inverses(job, list(norm_scales.values())), strict=True))
    of_mlps = _mlp_errors(_TriedMlps(job, trials, inputs, routing, norm_scales, inverses, states.gradients))
    take_back(job, states, routing)
    attention = _attention_errors(job, original.attention_moments, trials, states.attended)
    errors: Errors[Width] = {
        grid: {group.name: dict.fromkeys(group.num_bytes, 0.0) for group in trial.groups}
        for grid, trial in trials.items()
    }
    for found in (attention, *of_mlps):
        for grid, name, width, error in found:
            errors[grid][name][width] += error
    return errors


def _experts(layer: DecoderLayer, inputs: Mapping[Mlp, MlpInputs]) -> dict[Mlp, float]:
    """The MLPs that are tried -> for how many times its own tokens each stands."""
    measured = layer.experts[:: max(1, -(-len(layer.experts) // EXPERTS))]
    all_tokens, tokens = (sum(len(inputs[mlp].rows_R) for mlp in mlps) for mlps in (layer.experts, measured))
    return {mlp: 1.0 for mlp in layer.mlps if mlp.expert is None} | dict.fromkeys(measured, all_tokens / max(1, tokens))


def _attention_errors(
    job: LayerJob,
    moments: Mapping[ScaleGroup, InputMoments],
    trials: Mapping[Scheme, Trial[Width]],
    gradients: Activations,
) -> list[_Found[Width]]:
    """Errors on a few samples, as of all, on every rank; each attempt is one rank's."""
    if not moments:
        return []
    weights, scales = ResidentWeights(job.weights), dict[Scheme, dict[ScaleGroup, torch.Tensor]]()
    attempts: list[_Attempt[Width]] = []
    for grid, trial in trials.items():
        own = {group: found for group, found in moments.items() if group.consumers[0] in job.linears[grid]}
        scales[grid] = search_scales(job, weights, own, grid, job.ranks)
        if not grid.rounded:
            note_attention(job, grid, own, scales[grid])
        for group in own:
            for choosable, linears, widths in trial.inside(group.consumers):
                attempts += [_Attempt(grid, group, choosable, linears, width) for width in widths]
    sizes = [sum(prod(weights.shape(f"{linear}.weight")) for linear in one.linears) for one in attempts]
    of_ranks = [sorted(places) for places in dealt(sizes, job.ranks.size)]

    def errors() -> list[_Found[Width]]:
        gradients_RH = gradients.samples(0, min(ATTENTION_SAMPLES, job.inputs.shape[0])).flatten(0, 1)
        mine = [attempts[place] for place in of_ranks[job.ranks.rank]]
        return list(_errors_of(job, weights, mine, trials, moments, scales, gradients_RH))

    found = job.ranks.gather(job.ranks.together(errors))
    pairs = zip(chain(*of_ranks), chain(*found), strict=True)
    return [one for _, one in sorted(pairs, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class _Attempt(Generic[Width]):
    """Linears of attention that are stored at one width."""

    grid: Scheme
    group: ScaleGroup
    choosable: Choosable
    linears: Sequence[str]
    width: Width


def _errors_of(
    job: LayerJob,
    weights: Weights,
    attempts: Sequence[_Attempt[Width]],
    trials: Mapping[Scheme, Trial[Width]],
    moments: Mapping[ScaleGroup, InputMoments],
    scales: Mapping[Scheme, Mapping[ScaleGroup, torch.Tensor]],
    gradients_RH: torch.Tensor,
) -> Iterator[_Found[Width]]:
    """Errors of some of attention's linears, in their order."""
    wanted_RH = _attended(job, weights)
    for grid, on_grid in groupby(attempts, lambda one: one.grid):
        folded = ResidentWeights(FoldedWeights(weights, fold_scales(weights, scales[grid])))
        for group, of_group in groupby(on_grid, lambda one: one.group):
            job.safe_point(group.consumers[0])
            divided = prepared(under_scales(moments[group], scales[grid].get(group)), [grid], job.steps)
            for one in of_group:
                stored = (
                    trials[grid].store(one.choosable, one.width, linear, folded[f"{linear}.weight"], divided)
                    for linear in one.linears
                )
                replaced = {f"{linear}.weight": weight for linear, weight in zip(one.linears, stored, strict=True)}
                error_RH = _attended(job, ReplacedWeights(folded, replaced)) - wanted_RH
                error = divergence(error_RH, gradients_RH)
                yield grid, one.choosable.name, one.width, error * job.inputs.num_rows / len(wanted_RH)


def divergence(error_RH: torch.Tensor, gradients_RH: torch.Tensor) -> float:
    """Returns the KL divergence that errors of hidden states cause, summed over their tokens."""
    return float((error_RH * gradients_RH).sum(1).square().sum(dtype=torch.float64)) / 2


def _attended(job: LayerJob, weights: Weights) -> torch.Tensor:
    """Hidden states behind attention of a few samples, under other weights, float32 [R, H]."""
    inputs = Activations(job.inputs.samples(0, min(ATTENTION_SAMPLES, job.inputs.shape[0])))
    found: list[torch.Tensor] = []
    stream = Stream(weights, inputs, Activations(torch.empty(inputs.shape, device=job.weights.device)))
    run_dense_part(job.skeleton, job.layer, stream, job.batch_samples, {job.layer.norm: found.append})
    return torch.cat(found)


@dataclass(frozen=True)
class _TriedMlps(Generic[Width]):
    """The inputs on which a layer's MLPs are tried."""

    job: LayerJob
    trials: Mapping[Scheme, Trial[Width]]
    inputs: Mapping[Mlp, MlpInputs]
    routing: Routing | None
    norm_scales: Mapping[Scheme, torch.Tensor]
    """float32 [H]."""
    inverses: Mapping[Scheme, tuple[InverseFactor, ...]]
    gradients: Activations
    """Of the layer's outputs."""

    @cached_property
    def _shares(self) -> dict[Mlp, float]:
        return _experts(self.job.layer, self.inputs)

    @property
    def numbers(self) -> list[int]:
        """The MLPs of the layer that are tried: those that tokens reach, and any of whose linears is in a group."""
        wanted = [mlp for mlp in self._shares if self._grids(mlp) and len(self.inputs[mlp].rows_R)]
        return [number for number, mlp in enumerate(self.job.layer.mlps) if mlp in wanted]

    def _grids(self, mlp: Mlp) -> list[Scheme]:
        return [grid for grid, trial in self.trials.items() if any(trial.inside(mlp.linears))]

    def errors(self, number: int, original: GatedWeights) -> Iterator[_Found[Width]]:
        """Errors of an MLP's groups, for all tokens that it stands for."""
        job, mlp = self.job, self.job.layer.mlps[number]
        moments = moments_of(job, mlp, original, self.inputs[mlp], job.seed + number)
        for grid in self._grids(mlp):
            for name, width, error in self._on_grid(grid, mlp, original, moments):
                yield grid, name, width, error * self._shares[mlp]

    def _on_grid(
        self, grid: Scheme, mlp: Mlp, original: GatedWeights, moments: tuple[InputMoments, InputMoments]
    ) -> Iterator[tuple[str, Width, float]]:
        """Errors on at most `CHECK_ROWS` tokens, as of all."""
        job, inputs, norm_scales_H = self.job, self.inputs[mlp], self.norm_scales[grid]
        of_input = replace(moments[0].divided(norm_scales_H), inverses=self.inverses[grid])
        up_scales_W = search_up_scales(original, moments[1], grid, job.steps)
        folded = dict(zip(mlp.linears, scaled(original, norm_scales_H, up_scales_W).parts, strict=True))
        of_input, of_hidden = (prepared(one, [grid], job.steps) for one in (of_input, moments[1].divided(up_scales_W)))
        reads = dict(zip(mlp.linears, (of_input, of_input, of_hidden), strict=True))
        step = max(1, -(-len(inputs.rows_R) // CHECK_ROWS))
        inputs_RH, gradients_RH = (one.rows(inputs.rows_R[::step]) for one in (inputs.activations, self.gradients))
        share_R1 = torch.ones(len(inputs_RH), 1, device=inputs_RH.device)
        if mlp.expert is not None and self.routing is not None:
            share_R1 = self.routing.tokens_of(mlp.expert)[1][::step].unsqueeze(1)
        with fast_matmuls(inputs_RH.device):
            wanted_RH = original.output(job.skeleton, inputs_RH)
        trial = self.trials[grid]
        for group, linears, widths in trial.inside(mlp.linears):
            for width in widths:
                stored = {one: trial.store(group, width, one, folded[one], reads[one]) for one in linears}
                with fast_matmuls(inputs_RH.device):
                    found_RH = GatedWeights(*(folded | stored).values()).output(job.skeleton, inputs_RH / norm_scales_H)
                error = divergence((found_RH - wanted_RH) * share_R1, gradients_RH)
                yield group.name, width, error * len(inputs.rows_R) / len(inputs_RH)


def _mlp_errors(tried: _TriedMlps[Width]) -> list[list[_Found[Width]]]:
    """Errors of the MLPs that are tried, in their order, on every rank.

    Ranks take these in turns, and read them apart from all others: where all MLPs of a layer pass, ranks wait for one
    another, and experts that are evenly spaced may all be those of one rank.
    """
    job, found = tried.job, list[list[_Found[Width]]]()
    numbers = tried.numbers
    own = numbers[job.ranks.rank :: job.ranks.size]
    with recorded_launches():
        for place, number in enumerate(own):
            mlp = job.layer.mlps[number]
            job.safe_point(mlp.up.rsplit(".", 1)[0])
            original = GatedWeights.read(job.weights, mlp)
            ahead = [job.layer.mlps[later] for later in own[place + 1 :][:MLPS_AHEAD]]
            job.weights.prefetch([f"{linear}.weight" for one in ahead for linear in one.linears])
            found.append(list(tried.errors(number, original)))
    return job.ranks.in_turns(found, len(numbers))
