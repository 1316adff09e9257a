"""Runs the original and all candidates through the network together, one layer after another, in one pass over the
disk.

Every tensor of every model is read once, for all texts. Each candidate runs a layer twice, on its own hidden states and
on the original's: the first shows the accumulated error, the second the error of this layer alone.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples, L decoder layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsquant.errors import InputError
from dsquant.evaluation import router
from dsquant.evaluation.divergence import ComparedModels, Head, SafePoint, num_steps, score, scoring
from dsquant.evaluation.measures import Distance, LayerMeasures, Measures
from dsquant.evaluation.results import WeightError
from dsquant.evaluation.weight_errors import LayerComparison, Moments
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import ResidentWeights, WatchedWeights
from dsquant.model.streaming import (
    EMBEDDING,
    ROWS_AT_ONCE,
    Observer,
    Routing,
    Stream,
    add_expert,
    final_norm,
    head_name,
    run_dense_part,
    table_parts,
)
from dsquant.model.structure import DecoderLayer, Mlp
from dsquant.source.weights import Weights

# Tokens whose hidden states are scored after every layer.
LENS_TOKENS = 128
# Experts of every model that are read from disk while one is run.
EXPERTS_AHEAD = 2


@dataclass
class _Lane:
    """A model and the hidden states that pass through it: its own samples, followed by the original's."""

    weights: Weights
    batch_samples: int
    num_own: int
    """Samples that run on the model's own hidden states."""
    inputs: Activations
    outputs: Activations
    middle: Activations
    """Hidden states between attention and MLP."""
    mlp_inputs: Activations
    final: Activations
    """Normed: of every token after the last layer, then of the lens's tokens after each layer."""
    routing: Routing | None = None
    layers: list[LayerMeasures] = field(default_factory=list)
    errors: list[WeightError] = field(default_factory=list)

    @property
    def is_local(self) -> bool:
        """Whether it runs on the original's hidden states too."""
        return self.inputs.shape[0] > self.num_own


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
    ) -> None:
        """Creates the files of hidden states in `work`, for the samples of all texts, int64 [N, T]; None keeps them in
        the models' memory.

        `safe_point` is called before each model's layer, each expert and each part of the vocabulary.
        """
        self.skeleton, self.tokens_NT, self.safe_point = models.skeleton, tokens_NT, safe_point
        self._num_steps = num_steps(models.skeleton)
        self._work, self._num_files, self.device = work, 0, models.original.device
        self.lens_R = torch.linspace(0, tokens_NT.numel() - 1, min(LENS_TOKENS, tokens_NT.numel())).long()
        original, batch_samples = WatchedWeights(models.original, _refuse), models.batch_samples
        self.original = self._lane(original, batch_samples, 1)
        self.noise = self._lane(original, noise_batch(batch_samples), 1)
        self._not_finite: dict[str, set[str]] = {name: set() for name in models.candidates}
        watched = {name: WatchedWeights(one, self._not_finite[name].add) for name, one in models.candidates.items()}
        self.candidates = {name: self._lane(weights, batch_samples, 2) for name, weights in watched.items()}

    def _lane(self, weights: Weights, batch_samples: int, times: int) -> _Lane:
        num_samples, num_tokens = self.tokens_NT.shape
        hidden = self.skeleton.config["hidden_size"]
        shape = (times * num_samples, num_tokens, hidden)
        inputs, outputs, middle, mlp_inputs = (self._states(shape) for _ in range(4))
        final = self._states((self.tokens_NT.numel() + self.skeleton.num_layers * len(self.lens_R), 1, hidden))
        return _Lane(weights, batch_samples, num_samples, inputs, outputs, middle, mlp_inputs, final)

    def _states(self, shape: tuple[int, int, int]) -> Activations:
        self._num_files += 1
        path = None if self._work is None else self._work / f"evaluate-{self._num_files}.f32"
        return Activations.passing(path, shape, self.device)

    @property
    def lanes(self) -> tuple[_Lane, ...]:
        """The original, its second run, the candidates."""
        return self.original, self.noise, *self.candidates.values()

    def run(self) -> tuple[Measures, dict[str, Measures]]:
        """Runs all layers and scores the tokens; returns the noise floor and each candidate's measures. Raises
        InputError where a tensor of the original holds NaN or infinity."""
        self._embed()
        for layer in self.skeleton.layers[: self.skeleton.num_layers]:
            self._before(layer, f"{layer.prefix} of the original")
            self._run_layer(layer)
        for lane in self.lanes:
            for rows_R in torch.arange(self.tokens_NT.numel()).split(ROWS_AT_ONCE):
                self._set_final(lane, rows_R, lane.inputs.rows(rows_R))
        return self._score()

    def _before(self, layer: DecoderLayer, what: str) -> None:
        self.safe_point(layer.index, self._num_steps, what)

    def _embed(self) -> None:
        """Embeds every model's own samples, and compares the embedding tables."""
        tokens_R = self.tokens_NT.flatten().to(self.device)
        lanes = (self.original, *self.candidates.values())
        errors = {number: Distance() for number in range(1, len(lanes))}
        for parts in zip(*(table_parts(lane.weights, EMBEDDING) for lane in lanes), strict=True):
            start, original_VH = parts[0]
            rows_R = torch.where((tokens_R >= start) & (tokens_R < start + len(original_VH)))[0]
            for part_R in rows_R.split(ROWS_AT_ONCE):
                places_R = tokens_R[part_R] - start
                for lane, (_, table_VH) in zip(lanes, parts, strict=True):
                    lane.inputs.set_rows(part_R, table_VH[places_R])
                self.noise.inputs.set_rows(part_R, original_VH[places_R])
            for number, error in errors.items():
                error.add(original_VH, parts[number][1])
        for number, error in errors.items():
            lanes[number].errors.append(WeightError(EMBEDDING, None, error.relative, None))

    def _run_layer(self, layer: DecoderLayer) -> None:
        original = ResidentWeights(self.original.weights)
        moments = {name: Moments() for name in layer.attention_linears}
        moments |= {name: Moments() for mlp in layer.mlps if mlp.kind != "routed" for name in mlp.linears}
        self._run_dense_part(layer, self.original, original, {name: one.add for name, one in moments.items()})
        self._run_dense_part(layer, self.noise, original, {})
        if layer.router is not None:
            moments[layer.router.removesuffix(".weight")] = self._router_moments()
        comparisons = []
        for name, lane in self.candidates.items():
            self._before(layer, f"{layer.prefix} of {name}")
            for sample in range(lane.num_own):
                lane.inputs.set_samples(lane.num_own + sample, self.original.inputs.samples(sample, sample + 1))
            candidate = ResidentWeights(lane.weights)
            self._run_dense_part(layer, lane, candidate, {})
            comparison = LayerComparison(layer)
            comparison.dense_part(original, candidate, moments)
            comparisons.append(comparison)
        del original, candidate
        for place, mlp in enumerate(layer.experts):
            self._before(layer, mlp.gate.rpartition(".")[0])
            self._read_ahead(layer.experts[place + 1 : place + 1 + EXPERTS_AHEAD])
            self._run_expert(mlp, comparisons)
        for lane, comparison in zip(self.candidates.values(), comparisons, strict=True):
            lane.errors += comparison.errors
        self._finish_layer(layer)

    def _run_dense_part(
        self, layer: DecoderLayer, lane: _Lane, weights: Weights, observers: Mapping[str, Observer]
    ) -> None:
        own = {layer.norm: lane.middle.recorder(), layer.mlp_module: lane.mlp_inputs.recorder()}
        stream = Stream(weights, lane.inputs, lane.outputs)
        lane.routing = run_dense_part(self.skeleton, layer, stream, lane.batch_samples, {**observers, **own})

    def _router_moments(self) -> Moments:
        moments = Moments()
        for rows_R in torch.arange(self.original.mlp_inputs.num_rows).split(ROWS_AT_ONCE):
            moments.add(self.original.mlp_inputs.rows(rows_R))
        return moments

    def _read_ahead(self, mlps: Sequence[Mlp]) -> None:
        """Begins to read experts while a GPU computes another; a CPU is busy with that."""
        names = [f"{linear}.weight" for mlp in mlps for linear in mlp.linears]
        for lane in (self.original, *self.candidates.values()):
            lane.weights.prefetch(names if self.device.type == "cuda" else ())

    def _run_expert(self, mlp: Mlp, comparisons: Sequence[LayerComparison]) -> None:
        """Adds an expert to every lane, each model's weights read once, and compares them."""
        original = GatedWeights.read(self.original.weights, mlp)
        for lane in (self.original, self.noise):
            self._add_expert(lane, mlp, original)
        moments = self._expert_moments(mlp, original)
        for lane, comparison in zip(self.candidates.values(), comparisons, strict=True):
            candidate = GatedWeights.read(lane.weights, mlp)
            self._add_expert(lane, mlp, candidate)
            comparison.mlp(mlp, original, candidate, moments)

    def _add_expert(self, lane: _Lane, mlp: Mlp, weights: GatedWeights) -> None:
        assert mlp.expert is not None and lane.routing is not None
        rows_at_once = ROWS_AT_ONCE
        if lane is self.noise:  # as many tokens as a batch of its size gives an expert on average
            share = lane.routing.expert_RK.shape[1] / self.skeleton.sizes.num_experts
            rows_at_once = max(1, int(lane.batch_samples * self.tokens_NT.shape[1] * share))
        stream = Stream(lane.weights, lane.inputs, lane.outputs)
        add_expert(self.skeleton, mlp.expert, weights, stream, lane.mlp_inputs, lane.routing, rows_at_once)

    def _expert_moments(self, mlp: Mlp, weights: GatedWeights) -> dict[str, Moments]:
        assert mlp.expert is not None and self.original.routing is not None
        inputs, hidden = Moments(), Moments()
        rows_R, _ = self.original.routing.tokens_of(mlp.expert)
        for part_R in rows_R.split(ROWS_AT_ONCE) if len(rows_R) else ():
            inputs_RH = self.original.mlp_inputs.rows(part_R)
            inputs.add(inputs_RH)
            hidden.add(weights.hidden(self.skeleton, inputs_RH))
        return {mlp.gate: inputs, mlp.up: inputs, mlp.down: hidden}

    def _finish_layer(self, layer: DecoderLayer) -> None:
        """Keeps the layer's measures and the lens's tokens, and moves on."""
        for lane in (self.noise, *self.candidates.values()):
            lane.layers.append(self._layer_measures(lane, len(layer.experts)))
        first = self.tokens_NT.numel() + layer.index * len(self.lens_R)
        for lane in self.lanes:
            lane.inputs, lane.outputs = lane.outputs, lane.inputs
            self._set_final(lane, first + torch.arange(len(self.lens_R)), lane.inputs.rows(self.lens_R))

    def _layer_measures(self, lane: _Lane, num_experts: int) -> LayerMeasures:
        original, own = self.original, lane.num_own
        hidden, whole, attention, mlp = (Distance() for _ in range(4))
        for sample in range(own):
            at, local = (sample, sample + 1), (own + sample, own + sample + 1)
            before, middle, after = (part.samples(*at) for part in (original.inputs, original.middle, original.outputs))
            hidden.add(after, lane.outputs.samples(*at))
            if lane.is_local:
                local_middle, local_after = lane.middle.samples(*local), lane.outputs.samples(*local)
                whole.add(after - before, local_after - before)
                attention.add(middle - before, local_middle - before)
                mlp.add(after - middle, local_after - local_middle)
        errors = (hidden.relative, whole.relative, attention.relative, mlp.relative)
        if lane.routing is None or original.routing is None:
            return LayerMeasures(*errors)
        num_rows = self.tokens_NT.numel()
        routing, local_overlap = router.rows_of(lane.routing, 0, num_rows), None
        if lane.is_local:
            local_routing = router.rows_of(lane.routing, num_rows, 2 * num_rows)
            local_overlap = float(router.overlap(original.routing, local_routing).mean())
        return LayerMeasures(
            *errors,
            overlap_NT=router.overlap(original.routing, routing).view(self.tokens_NT.shape).cpu(),
            local_overlap=local_overlap,
            weight_distance=router.weight_distance(original.routing, routing, num_experts),
            load_shift=router.load_shift(original.routing, routing, num_experts),
        )

    def _set_final(self, lane: _Lane, rows_R: torch.Tensor, hidden_RH: torch.Tensor) -> None:
        normed = final_norm(self.skeleton, lane.weights, hidden_RH.unsqueeze(0))
        lane.final.set_rows(rows_R, normed.squeeze(0))

    def _score(self) -> tuple[Measures, dict[str, Measures]]:
        num_layers, num_rows, shape = self.skeleton.num_layers, self.tokens_NT.numel(), self.tokens_NT.shape
        name = head_name(self.skeleton)
        targets_R = torch.cat([torch.roll(self.tokens_NT.flatten(), -1), torch.zeros(num_layers * len(self.lens_R))])
        heads = [Head(lane.weights, name, lane.final) for lane in self.lanes]
        tables = {number: Distance() for number in range(2, len(heads))}

        def compare_part(part: int, parts: Sequence[torch.Tensor]) -> None:
            self.safe_point(*scoring(self.skeleton, part))
            for number, error in tables.items():
                error.add(parts[0], parts[number])

        scores = score(heads[0], heads[1:], targets_R.long().to(self.device), compare_part)
        if name != EMBEDDING:
            for number, error in tables.items():
                self.lanes[number].errors.append(WeightError(name, None, error.relative, None))
        for candidate, lane in self.candidates.items():
            compared = {error.name for error in lane.errors}
            lane.errors += map(_without_numbers, sorted(self._not_finite[candidate] - compared))
        measures = [
            Measures(
                tokens=rows.tokens((shape[0], shape[1])),
                layers=tuple(lane.layers),
                lens_kl=tuple(rows.kl_R[num_rows:].view(num_layers, -1).mean(1).tolist()),
                weights=tuple(lane.errors),
            )
            for lane, rows in zip(self.lanes[1:], scores, strict=True)
        ]
        return measures[0], dict(zip(self.candidates, measures[1:], strict=True))
