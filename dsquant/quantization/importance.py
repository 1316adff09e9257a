"""Collects each input channel's importance in the original's forward pass, as in llama.cpp's importance matrix.

The importance of a column is the mean square of its input over the tokens that reach the linear. An expert with few
tokens of its own also gets those that the router scores next highest for it, as in AWQ.

Shape legend: R tokens, I in features, H heads, N rows of a head's keys without position.
"""

from collections.abc import Mapping

import torch

from dsquant.kernels.products import apply_linear
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import ResidentWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import KEYS_SUFFIX, Mlp
from dsquant.quantization.layer_job import LayerJob, LayerReport
from dsquant.quantization.layer_mlps import own_mlps
from dsquant.quantization.mlp_inputs import top_up
from dsquant.quantization.sharing import share_routing, share_rows
from dsquant.quantization.statistics import Importance
from dsquant.source.weights import Weights


class _Squares:
    """Sums of squares of every part that is observed, added in their order at the end."""

    def __init__(self) -> None:
        self.parts: list[tuple[torch.Tensor, int]] = []

    def add(self, inputs_RI: torch.Tensor) -> None:
        self.parts.append((inputs_RI.square().sum(0, dtype=torch.float64), len(inputs_RI)))

    def importance(self) -> Importance:
        sum_I = self.parts[0][0].clone()
        for squares_I, _ in self.parts[1:]:
            sum_I += squares_I
        return Importance(sum_I.float(), sum(count for _, count in self.parts))


def observe_layer(job: LayerJob) -> LayerReport:
    """Runs an original layer and notes the importance of all its linears; those of MLPs are emitted unchanged.

    Nothing is quantized onto the job's grids. The report has the tokens of each expert.
    """
    layer = job.layer
    job.safe_point(layer.attention_module)
    routing = _observe_dense_part(job)
    added = top_up(layer, job.weights, job.mlp_inputs, routing) if routing else {}
    for number, original in own_mlps(job, routing):
        _observe_mlp(job, layer.mlps[number], original, routing, added)
    counts = routing.counts(len(layer.experts)).tolist() if routing else []
    return LayerReport(counts, {expert: len(rows_R) for expert, rows_R in added.items()}, [])


def _observe_dense_part(job: LayerJob) -> Routing | None:
    grid, layer, own = job.grids[0], job.layer, job.shares.samples(job.ranks.rank)
    weights = ResidentWeights(job.weights)
    squares = {group.consumers[0]: _Squares() for group in layer.attention}
    observers: dict[str, Observer] = {name: found.add for name, found in squares.items()}
    observers[layer.mlp_module] = job.mlp_inputs.recorder(own[0] * job.inputs.shape[1])
    keys = _KeySquares(job, weights)
    if keys.projection:
        observers[keys.projection] = _both(observers.get(keys.projection), keys.add)
    routing, stream = None, Stream(weights, job.inputs, job.outputs)
    if own[0] < own[1]:
        routing = run_dense_part(job.skeleton, layer, stream, job.batch_samples, observers, own)
    for found in (*squares.values(), keys.squares):
        parts = job.ranks.gather([(squares_I.cpu(), count) for squares_I, count in found.parts])
        found.parts = [part for rank in parts for part in rank]
    if job.ranks.first:
        for group in layer.attention:
            for linear in group.consumers:
                job.note(grid, linear, squares[group.consumers[0]].importance())
        if keys.absorbed:
            job.note(grid, keys.absorbed.keys_and_values + KEYS_SUFFIX, keys.squares.importance())
    share_rows(job.mlp_inputs, job.ranks, job.shares)
    return share_routing(routing, job.ranks, job.weights.device)


def _both(first: Observer | None, second: Observer) -> Observer:
    def observe(inputs_RI: torch.Tensor) -> None:
        if first is not None:
            first(inputs_RI)
        second(inputs_RI)

    return observe


class _KeySquares:
    """Mean squares of MLA's queries without position: what the keys of kv_b_proj are multiplied with."""

    def __init__(self, job: LayerJob, weights: Weights) -> None:
        self.absorbed, self.squares, self._weights = job.layer.absorbed, _Squares(), weights
        self.projection = self.absorbed.queries if self.absorbed else ""

    def add(self, inputs_RI: torch.Tensor) -> None:
        assert self.absorbed is not None
        queries_RO = apply_linear(inputs_RI, self._weights[f"{self.projection}.weight"])
        self.squares.add(queries_RO.unflatten(1, (self.absorbed.num_heads, -1))[..., : self.absorbed.key_rows])


def _observe_mlp(
    job: LayerJob, mlp: Mlp, original: GatedWeights, routing: Routing | None, added: Mapping[int, torch.Tensor]
) -> None:
    grid = job.grids[0]
    rows_R = torch.arange(job.mlp_inputs.num_rows, device=job.weights.device)
    if mlp.expert is not None:
        assert routing is not None
        own_R, _ = routing.tokens_of(mlp.expert)
        rows_R = torch.cat([own_R, added.get(mlp.expert, own_R[:0])])
    of_input, of_hidden = _Squares(), _Squares()
    for part_R in rows_R.split(ROWS_AT_ONCE):
        inputs_RH = job.mlp_inputs.rows(part_R)
        of_input.add(inputs_RH)
        of_hidden.add(original.hidden(job.skeleton, inputs_RH))
    for linear, weight, squares in zip(mlp.linears, original.parts, (of_input, of_input, of_hidden), strict=True):
        job.note(grid, linear, squares.importance())
        job.emit(grid, f"{linear}.weight", weight)
