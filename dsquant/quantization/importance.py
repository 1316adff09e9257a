"""How much each input channel of each linear matters: llama.cpp's importance matrix, from the original's forward pass.

The importance of a column is the mean square of its input over the tokens that reach the linear. An expert with few
tokens of its own is judged on its router's next best as well, as for AWQ.

Shape legend: R tokens, I in features, H heads, N rows of a head's keys without position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.overlays import ResidentWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import ROWS_AT_ONCE, Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import KEYS_SUFFIX, DecoderLayer, Mlp
from dsquant.quantization.mlp_inputs import top_up
from dsquant.quantization.statistics import Importance
from dsquant.source.weights import Weights

Emit = Callable[[str, torch.Tensor, Importance], None]
"""Gets a linear's name, its weight and its importance."""


class _Squares:
    def __init__(self) -> None:
        self._sum_I: torch.Tensor | None = None
        self._count = 0

    def add(self, inputs_RI: torch.Tensor) -> None:
        squares_I = inputs_RI.square().sum(0, dtype=torch.float64)
        self._sum_I = squares_I if self._sum_I is None else self._sum_I + squares_I
        self._count += len(inputs_RI)

    def importance(self) -> Importance:
        assert self._sum_I is not None
        return Importance(self._sum_I.float(), self._count)


@dataclass(frozen=True)
class ObservationJob:
    """What observing a layer needs."""

    skeleton: Skeleton
    layer: DecoderLayer
    weights: Weights
    inputs: Activations
    outputs: Activations
    """Gets the layer's outputs."""
    mlp_inputs: Activations
    """Gets what the MLPs read."""
    batch_samples: int
    emit: Emit
    """Gets every linear of every MLP, one after the other."""
    safe_point: Callable[[str], None]


@dataclass(frozen=True)
class LayerImportance:
    """What was observed."""

    attention: dict[str, Importance]
    """Linear, or kv_b_proj with `KEYS_SUFFIX` -> importance."""
    tokens_per_expert: list[int]
    """Empty for a dense layer."""
    topped_up: dict[int, int]
    """Expert -> tokens added to its own."""


def observe_layer(job: ObservationJob) -> LayerImportance:
    """Runs an original layer; its MLPs pass through memory one by one and are handed on with their importance.

    Args:
        job: the layer and its surroundings.

    Returns:
        What was observed of attention and routing.
    """
    layer = job.layer
    job.safe_point(layer.attention_module)
    attention, routing = _run_dense_part(job)
    added = top_up(layer, job.weights, job.mlp_inputs, routing) if routing else {}
    for mlp in layer.mlps:
        job.safe_point(mlp.up.rsplit(".", 1)[0])
        _observe_mlp(job, mlp, routing, added)
    counts = routing.counts(len(layer.experts)).tolist() if routing else []
    return LayerImportance(attention, counts, {expert: len(rows_R) for expert, rows_R in added.items()})


def _run_dense_part(job: ObservationJob) -> tuple[dict[str, Importance], Routing | None]:
    weights = ResidentWeights(job.weights)
    squares = {group.consumers[0]: _Squares() for group in job.layer.attention}
    observers: dict[str, Observer] = {name: found.add for name, found in squares.items()}
    observers[job.layer.mlp_module] = job.mlp_inputs.recorder()
    keys = _KeySquares(job, weights)
    if keys.projection:
        observers[keys.projection] = _both(observers.get(keys.projection), keys.add)
    routing = run_dense_part(
        job.skeleton, job.layer, Stream(weights, job.inputs, job.outputs), job.batch_samples, observers
    )
    found = {
        linear: squares[group.consumers[0]].importance() for group in job.layer.attention for linear in group.consumers
    }
    return found | keys.importance(), routing


def _both(first: Observer | None, second: Observer) -> Observer:
    def observe(inputs_RI: torch.Tensor) -> None:
        if first is not None:
            first(inputs_RI)
        second(inputs_RI)

    return observe


class _KeySquares:
    """Mean squares of MLA's queries without position: what the keys of kv_b_proj are multiplied with."""

    def __init__(self, job: ObservationJob, weights: Weights) -> None:
        self._absorbed, self._squares, self._weights = job.layer.absorbed, _Squares(), weights
        self.projection = self._absorbed.queries if self._absorbed else ""

    def add(self, inputs_RI: torch.Tensor) -> None:
        assert self._absorbed is not None
        queries_RO = apply_linear(inputs_RI, self._weights[f"{self.projection}.weight"])
        self._squares.add(queries_RO.unflatten(1, (self._absorbed.num_heads, -1))[..., : self._absorbed.key_rows])

    def importance(self) -> dict[str, Importance]:
        absorbed = self._absorbed
        return {absorbed.keys_and_values + KEYS_SUFFIX: self._squares.importance()} if absorbed else {}


def _observe_mlp(job: ObservationJob, mlp: Mlp, routing: Routing | None, added: Mapping[int, torch.Tensor]) -> None:
    original = GatedWeights.read(job.weights, mlp)
    rows_R = torch.arange(job.mlp_inputs.num_rows, device=job.weights.device)
    if mlp.expert is not None:
        assert routing is not None
        own_R, share_R = routing.tokens_of(mlp.expert)
        for part_R, part_share_R in zip(own_R.split(ROWS_AT_ONCE), share_R.split(ROWS_AT_ONCE), strict=True):
            output_RH = original.output(job.skeleton, job.mlp_inputs.rows(part_R))
            job.outputs.add_rows(part_R, output_RH.mul_(part_share_R.unsqueeze(1)))
        rows_R = torch.cat([own_R, added.get(mlp.expert, own_R[:0])])
    of_input, of_hidden = _Squares(), _Squares()
    for part_R in rows_R.split(ROWS_AT_ONCE):
        inputs_RH = job.mlp_inputs.rows(part_R)
        of_input.add(inputs_RH)
        of_hidden.add(original.hidden(job.skeleton, inputs_RH))
    for linear, weight, squares in zip(
        mlp.linears,
        (original.gate_WH, original.up_WH, original.down_HW),
        (of_input, of_input, of_hidden),
        strict=True,
    ):
        job.emit(linear, weight, squares.importance())
