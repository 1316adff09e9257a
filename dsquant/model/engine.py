"""What an engine does to activations that the network itself does not: rounds them beside quantized weights.

Which rounding is the weights' to say (`Weights.rounding_beside`); here it is put into transformers' modules. Routed
experts are no modules: `GatedWeights` rounds for them.

MLA's keys are rounded where llama.cpp rounds them: it never makes them from latents, but multiplies each head's query
with kv_b_proj's rows of keys, and the product with the latents. So it is the query that is rounded, and the scores are
the same. The latents that it mixes and multiplies with kv_b_proj's rows of values stay as they are: rounding them would
take an attention of our own, and adds 0.0004 nats to the mean KL at the most (decision 14).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dsquant.kernels.activation_rounding import Rounding, unrounded
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights


@contextmanager
def rounded_linears(skeleton: Skeleton, layer: DecoderLayer, weights: Weights) -> Iterator[None]:
    """Lets a layer's linears, but not its routed experts, round their inputs for as long as the context is open.

    Args:
        skeleton: the network.
        layer: the layer.
        weights: what it runs on.

    Yields:
        Nothing.
    """
    linears = [*layer.attention_linears, *(name for mlp in layer.mlps if mlp.kind != "routed" for name in mlp.linears)]
    roundings = {name: weights.rounding_beside(f"{name}.weight") for name in linears}
    queries, keys = layer.absorbed or ("", "")
    of_queries = roundings.pop(keys, unrounded)
    with _rounded_inputs(skeleton, roundings):
        if of_queries is unrounded:
            yield
            return
        heads, width = (int(skeleton.config[key]) for key in ("num_attention_heads", "qk_nope_head_dim"))
        handle = skeleton.module(queries).register_forward_hook(partial(_round_queries, of_queries, heads, width))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def rounded_head(skeleton: Skeleton, table: str, weights: Weights) -> Iterator[None]:
    """Lets the head round its input for as long as the context is open.

    Args:
        skeleton: the network.
        table: the name of the head's weight.
        weights: what the network runs on.

    Yields:
        Nothing.
    """
    with _rounded_inputs(skeleton, {"lm_head": weights.rounding_beside(table)}):
        yield


@contextmanager
def _rounded_inputs(skeleton: Skeleton, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    handles = [
        skeleton.module(name).register_forward_pre_hook(partial(_round_input, rounding))
        for name, rounding in roundings.items()
        if rounding is not unrounded
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_input(rounding: Rounding, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return rounding(arguments[0])


def _round_queries(
    rounding: Rounding, num_heads: int, width: int, _: nn.Module, arguments: Any, output: torch.Tensor
) -> torch.Tensor:
    """Rounds the part of each head's query that has no position, which comes first, in place."""
    plain = output.unflatten(-1, (num_heads, -1))[..., :width]
    plain.copy_(rounding(plain))
    return output
