"""Runs the original and all candidates through the network together, one layer after another, in one pass over the
disk.

Every tensor of every model is read once, for all texts. Each candidate runs a layer twice, on its own hidden states and
on the original's: the first shows the accumulated error, the second the error of this layer alone.

Several ranks share a layer as they do in a job (docs/decisions/0013): each runs the dense part on its own samples, has
one expert at a time, and scores its share of the tokens; the numbers are those of one rank.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples, L decoder layers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dsquant.errors import InputError
from dsquant.evaluation.divergence import ComparedModels, Head, SafePoint, num_steps, score, scoring
from dsquant.evaluation.lanes import Lane, Runner, layer_measures
from dsquant.evaluation.measures import Distance, Measures
from dsquant.evaluation.reading import Reading, SideStream, units_of
from dsquant.evaluation.results import WeightError
from dsquant.evaluation.routed import RoutedExperts
from dsquant.evaluation.weight_errors import LayerComparison, Moments
from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations
from dsquant.model.overlays import ResidentWeights, WatchedWeights
from dsquant.model.streaming import (
    EMBEDDING,
    ROWS_AT_ONCE,
    Observer,
    Stream,
    final_norm,
    head_name,
    run_dense_part,
    table_parts,
)
from dsquant.model.structure import DecoderLayer
from dsquant.quantization.sharing import share_routing, share_rows
from dsquant.source.weights import Weights

# Tokens whose hidden states are scored after every layer.
LENS_TOKENS = 128


def noise_batch(batch_samples: int) -> int:
    """Returns the other batch size, in which the original runs a second time for the noise floor."""
    return batch_samples // 2 or 2


def _refuse(name: str) -> None:
    raise InputError(
        f"the reference's tensor {name!r} holds NaN or infinity: nothing can be measured against it; download or "
        "create the reference again"
    )


def _without_numbers(name: str) -> WeightError:
    """Returns an infinite error for a tensor that is not compared, such as a norm: AWQ folds scales into it."""
    parts = name.split(".")
    return WeightError(name, int(parts[2]) if parts[1] == "layers" else None, math.inf, None)


class Lockstep:
    """The models on their way through the network."""

    def __init__(
        self,
        models: ComparedModels,
        tokens_NT: torch.Tensor,
        work: Path | None,
        safe_point: SafePoint = lambda *_: None,
        ranks: Ranks = ALONE,
        ahead_bytes: int = 0,
    ) -> None:
        """Creates the files of hidden states in `work`, for the samples of all texts, int64 [N, T]; None keeps them in
        the models' memory.

        `safe_point` is called before each model's layer, each expert and each part of the vocabulary. For a GPU weights
        are read ahead into `ahead_bytes` of memory, at least those of one expert.
        """
        self.skeleton, self.tokens_NT, self.safe_point = models.skeleton, tokens_NT, safe_point
        self.ranks, batch_samples = ranks, models.batch_samples
        # whole batches of both sizes
        together = math.lcm(batch_samples, noise_batch(batch_samples))
        self.shares = Shares(tokens_NT.shape[0], together, ranks.size)
        self.token_shares = Shares(tokens_NT.numel(), together * tokens_NT.shape[1], ranks.size)
        self._num_steps = num_steps(models.skeleton)
        self._work, self._num_files, self.device = work, 0, models.original.device
        self.lens_R = torch.linspace(0, tokens_NT.numel() - 1, min(LENS_TOKENS, tokens_NT.numel())).long()
        original = WatchedWeights(models.original, _refuse)
        self.original = self._runner(original, batch_samples)
        self.noise = self._runner(original, noise_batch(batch_samples))
        self._not_finite: dict[str, set[str]] = {name: set() for name in models.candidates}
        watched = {name: WatchedWeights(one, self._not_finite[name].add) for name, one in models.candidates.items()}
        self.candidates = {name: self._runner(weights, batch_samples, True) for name, weights in watched.items()}
        self._watched = (original, *watched.values())
        units = units_of(models.skeleton, ranks.rank, ranks.size) if self.device.type == "cuda" else iter(())
        self.reading, self.side_stream = Reading(self._watched, units, ahead_bytes), SideStream(self.device)

    def _runner(self, weights: Weights, batch_samples: int, is_candidate: bool = False) -> Runner:
        num_samples, num_tokens = self.tokens_NT.shape
        hidden = self.skeleton.config["hidden_size"]
        shape = (num_samples, num_tokens, hidden)
        inputs, outputs, middle, mlp_inputs = (self._states(shape) for _ in range(4))
        own, local = Lane(weights, batch_samples, inputs, outputs, middle, mlp_inputs), None
        if is_candidate:  # it reads the original's inputs
            outputs, middle, mlp_inputs = (self._states(shape) for _ in range(3))
            local = Lane(weights, batch_samples, inputs, outputs, middle, mlp_inputs)
        num_final = self.tokens_NT.numel() + self.skeleton.num_layers * len(self.lens_R)
        return Runner(own, local, self._states((num_final, 1, hidden)))

    def _states(self, shape: tuple[int, int, int]) -> Activations:
        self._num_files += 1
        path = None if self._work is None else self._work / f"evaluate-{self._num_files}.f32"
        return Activations.passing(path, shape, self.device)

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The original, its second run, the candidates."""
        return self.original, self.noise, *self.candidates.values()

    def run(self) -> tuple[Measures, dict[str, Measures]]:
        """Runs all layers and scores the tokens; returns the noise floor and each candidate's measures, on every rank.
        Raises InputError where a tensor of the original holds NaN or infinity."""
        self._embed()
        self.ranks.together(self._settle)
        for layer in self.skeleton.layers[: self.skeleton.num_layers]:
            self._before(layer, f"{layer.prefix} of the original")
            self._run_layer(layer)
        first, end = self.token_shares.samples(self.ranks.rank)
        for runner in self.runners:
            for rows_R in torch.arange(first, end).split(ROWS_AT_ONCE):
                self._set_final(runner, rows_R, runner.own.inputs.rows(rows_R))
            share_rows(runner.final, self.ranks, self.token_shares)
        return self._score()

    def _before(self, layer: DecoderLayer, what: str) -> None:
        self.safe_point(layer.index, self._num_steps, what)

    def _embed(self) -> None:
        """Embeds this rank's samples in every model, and compares the embedding tables."""
        first, end = self.token_shares.samples(self.ranks.rank)
        tokens_R = self.tokens_NT.flatten()[first:end].to(self.device)
        runners = (self.original, *self.candidates.values())
        errors = {number: Distance() for number in range(1, len(runners))}
        for parts in zip(*(table_parts(one.own.weights, EMBEDDING) for one in runners), strict=True):
            start, original_VH = parts[0]
            rows_R = torch.where((tokens_R >= start) & (tokens_R < start + len(original_VH)))[0]
            for part_R in rows_R.split(ROWS_AT_ONCE):
                places_R = tokens_R[part_R] - start
                for runner, (_, table_VH) in zip(runners, parts, strict=True):
                    runner.own.inputs.set_rows(first + part_R, table_VH[places_R])
                self.noise.own.inputs.set_rows(first + part_R, original_VH[places_R])
            for number, error in errors.items():
                error.add(original_VH, parts[number][1])
        for number, error in errors.items():
            runners[number].errors.append(WeightError(EMBEDDING, None, error.relative, None))

    def _run_layer(self, layer: DecoderLayer) -> None:
        original = ResidentWeights(self.original.own.weights)
        moments = {name: Moments() for name in layer.attention_linears}
        moments |= {name: Moments() for mlp in layer.mlps if mlp.kind != "routed" for name in mlp.linears}
        self._run_dense_part(layer, self.original.own, original, {name: one.add for name, one in moments.items()})
        self._share_moments(moments)
        self._run_dense_part(layer, self.noise.own, original, {})
        if layer.router is not None:
            moments[layer.router.removesuffix(".weight")] = self._router_moments()
        comparisons = []
        for name, runner in self.candidates.items():
            self._before(layer, f"{layer.prefix} of {name}")
            assert runner.local is not None
            runner.local.inputs = self.original.own.inputs
            candidate = ResidentWeights(runner.own.weights)
            for lane in runner.lanes:
                self._run_dense_part(layer, lane, candidate, {})
            comparison = LayerComparison(layer)
            comparison.dense_part(original, candidate, moments)
            comparisons.append(comparison)
        del original, candidate
        self.reading.used()
        found = self._run_experts(layer, comparisons) if layer.experts else [[] for _ in comparisons]
        for runner, comparison, of_experts in zip(self.candidates.values(), comparisons, found, strict=True):
            runner.errors += [*(one.error() for one in comparison.sums), *of_experts]
        self.ranks.together(self._settle)
        self._finish_layer(layer)

    def _run_dense_part(
        self, layer: DecoderLayer, lane: Lane, weights: Weights, observers: Mapping[str, Observer]
    ) -> None:
        first_row, samples = self.token_shares.samples(self.ranks.rank)[0], self.shares.samples(self.ranks.rank)
        own = {layer.norm: lane.middle.recorder(first_row), layer.mlp_module: lane.mlp_inputs.recorder(first_row)}
        stream = Stream(weights, lane.inputs, lane.outputs)
        found = run_dense_part(self.skeleton, layer, stream, lane.batch_samples, {**observers, **own}, samples)
        lane.routing = share_routing(found, self.ranks, self.device)
        if lane.routing is not None:
            share_rows(lane.mlp_inputs, self.ranks, self.shares)

    def _share_moments(self, moments: Mapping[str, Moments]) -> None:
        """Gives every rank the moments of all samples' batches, in their order."""
        if self.ranks.size == 1:
            return
        found = self.ranks.gather([[part.cpu() for part in one.parts] for one in moments.values()])
        for one, parts in zip(moments.values(), zip(*found, strict=True), strict=True):
            one.parts = [part.to(self.device) for of_rank in parts for part in of_rank]

    def _router_moments(self) -> Moments:
        moments, inputs = Moments(), self.original.own.mlp_inputs
        for rows_R in torch.arange(inputs.num_rows).split(ROWS_AT_ONCE):
            moments.add(inputs.rows(rows_R))
        return moments

    def _settle(self) -> None:
        """Raises InputError where a weight of the original that a GPU has read holds NaN or infinity."""
        for weights in self._watched:
            weights.settle()

    def _run_experts(self, layer: DecoderLayer, comparisons: Sequence[LayerComparison]) -> list[list[WeightError]]:
        """Adds the experts to every lane, each rank one at a time; returns their errors by candidate."""
        routing = self.noise.own.routing
        assert routing is not None
        share = routing.expert_RK.shape[1] / self.skeleton.sizes.num_experts
        experts = RoutedExperts(
            self.skeleton,
            layer,
            [self.original.own, self.noise.own, *(lane for one in self.candidates.values() for lane in one.lanes)],
            comparisons,
            # as many tokens as a batch of its size gives an expert on average
            max(1, int(self.noise.own.batch_samples * self.tokens_NT.shape[1] * share)),
            self.ranks,
            self.token_shares,
            self.reading,
            self.side_stream,
            lambda what: self._before(layer, what),
        )
        return experts.run()

    def _finish_layer(self, layer: DecoderLayer) -> None:
        """Keeps the layer's measures and the lens's tokens, and moves on."""
        samples = range(*self.shares.samples(self.ranks.rank))
        for runner in (self.noise, *self.candidates.values()):
            found = layer_measures(self.original.own, runner, len(layer.experts), samples, self.ranks)
            runner.layers.append(found)
        rows_R = self.tokens_NT.numel() + layer.index * len(self.lens_R) + torch.arange(len(self.lens_R))
        for runner in self.runners:
            runner.own.inputs, runner.own.outputs = runner.own.outputs, runner.own.inputs
            self._set_final(runner, rows_R, self._lens(runner.own.inputs))

    def _lens(self, states: Activations) -> torch.Tensor:
        """The hidden states of the lens's tokens, from all ranks."""
        if self.ranks.size == 1:
            return states.rows(self.lens_R)
        first, end = self.token_shares.samples(self.ranks.rank)
        own_R = self.lens_R[(self.lens_R >= first) & (self.lens_R < end)]
        return torch.cat(self.ranks.gather(states.rows(own_R).cpu())).to(self.device)

    def _set_final(self, runner: Runner, rows_R: torch.Tensor, hidden_RH: torch.Tensor) -> None:
        normed = final_norm(self.skeleton, runner.own.weights, hidden_RH.unsqueeze(0))
        runner.final.set_rows(rows_R, normed.squeeze(0))

    def _score(self) -> tuple[Measures, dict[str, Measures]]:
        num_layers, num_rows, shape = self.skeleton.num_layers, self.tokens_NT.numel(), self.tokens_NT.shape
        name = head_name(self.skeleton)
        targets_R = torch.cat([torch.roll(self.tokens_NT.flatten(), -1), torch.zeros(num_layers * len(self.lens_R))])
        heads = [Head(runner.own.weights, name, runner.final) for runner in self.runners]
        tables = {number: Distance() for number in range(2, len(heads))}

        def compare_part(part: int, parts: Sequence[torch.Tensor]) -> None:
            self.safe_point(*scoring(self.skeleton, part))
            for number, error in tables.items():
                error.add(parts[0], parts[number])

        scores = score(heads[0], heads[1:], targets_R.long().to(self.device), compare_part, self.ranks)
        self.ranks.together(self._settle)
        if name != EMBEDDING:
            for number, error in tables.items():
                self.runners[number].errors.append(WeightError(name, None, error.relative, None))
        for candidate, runner in self.candidates.items():
            compared = {error.name for error in runner.errors}
            not_finite = set().union(*self.ranks.gather(self._not_finite[candidate]))
            runner.errors += map(_without_numbers, sorted(not_finite - compared))
        measures = [
            Measures(
                tokens=rows.tokens((shape[0], shape[1])),
                layers=tuple(runner.layers),
                lens_kl=tuple(rows.kl_R[num_rows:].view(num_layers, -1).mean(1).tolist()),
                weights=tuple(runner.errors),
            )
            for runner, rows in zip(self.runners[1:], scores, strict=True)
        ]
        return measures[0], dict(zip(self.candidates, measures[1:], strict=True))
