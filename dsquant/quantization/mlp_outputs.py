"""Adds what a layer's MLPs put out to the hidden states behind it; each rank has one of them in memory.

Shape legend: H hidden size, R tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.sharing import exchange_rows

Tokens = tuple[torch.Tensor, torch.Tensor]
"""The rows that reach an MLP, int64 in ascending order, and its share in each, float32 [R]."""
Contribute = Callable[[Mlp, GatedWeights, torch.Tensor, torch.Tensor], torch.Tensor]
"""Gets an MLP, its weights, some of its rows and its share in each; returns what is added there, float32 [R, H]."""


@dataclass(frozen=True)
class MlpStream:
    """What a layer's MLPs read in one model, and what they add to."""

    inputs: Activations
    outputs: Activations
    tokens_of: Callable[[Mlp], Tokens]
    """Gives the tokens for which an MLP's outputs are added."""
    scales_H: torch.Tensor | None = None
    """Divide the inputs, where the weights are under the norm's scales."""
    contribute: Contribute | None = None
    """Makes what is added instead of outputs."""


def routed_tokens(routing: Routing, mlp: Mlp) -> Tokens:
    """Returns an expert's tokens, and none for an MLP that is always read: it is part of transformers' own forward."""
    return routing.tokens_of(-1 if mlp.expert is None else mlp.expert)


def add_outputs(job: LayerJob, turn: Sequence[Mlp], own: GatedWeights | None, stream: MlpStream) -> None:
    """Adds what a turn's MLPs, one for each rank, put out, in the order of MLPs; all ranks call it.

    The r-th MLP of `turn` is rank r's; `own` are the weights of this rank's, None where it has none.
    """
    tokens, rank = [stream.tokens_of(mlp) for mlp in turn], job.ranks.rank
    loaded = None if own is None else (turn[rank], own)
    if job.ranks.size == 1:
        for rows_R, output_RH in _parts(job, loaded, stream, tokens[0]):
            stream.outputs.add_rows(rows_R, output_RH)
        return
    none_RH = torch.empty(0, job.inputs.shape[2], device=job.weights.device)
    for exchange in _exchanges(turn, tokens, job.ranks.size):
        made = [output_RH for _, output_RH in _parts(job, loaded, stream, exchange[rank])]
        tokens_of = [rows_R for rows_R, _ in exchange]
        exchange_rows(job.ranks, job.shares, stream.outputs, tokens_of, torch.cat([none_RH, *made]))


def _exchanges(turn: Sequence[Mlp], tokens: Sequence[Tokens], num_ranks: int) -> Iterator[list[Tokens]]:
    """Yields tokens by rank that cross the network together: those of neighbouring experts; `ROWS_AT_ONCE` of an MLP
    that is always read, whose outputs for all tokens memory would not hold."""
    none = (tokens[0][0][:0], tokens[0][1][:0])
    for routed, places in groupby(range(len(turn)), lambda place: turn[place].expert is not None):
        if routed:
            own = set(places)
            yield [tokens[rank] if rank in own else none for rank in range(num_ranks)]
            continue
        for place in places:
            for part in zip(*(column.split(ROWS_AT_ONCE) for column in tokens[place]), strict=True):
                if len(part[0]):
                    yield [part if rank == place else none for rank in range(num_ranks)]


def _parts(
    job: LayerJob, loaded: tuple[Mlp, GatedWeights] | None, stream: MlpStream, tokens: Tokens
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields rows and an MLP's outputs there times its share, `ROWS_AT_ONCE` together."""
    if loaded is None or not len(tokens[0]):
        return
    mlp, weights = loaded
    for rows_R, share_R in zip(*(column.split(ROWS_AT_ONCE) for column in tokens), strict=True):
        if stream.contribute is not None:
            yield rows_R, stream.contribute(mlp, weights, rows_R, share_R)
            continue
        inputs_RH = stream.inputs.rows(rows_R)
        if stream.scales_H is not None:
            inputs_RH /= stream.scales_H
        with fast_matmuls(job.weights.device):
            output_RH = weights.output(job.skeleton, inputs_RH)
        yield rows_R, output_RH.mul_(share_R.unsqueeze(1))
