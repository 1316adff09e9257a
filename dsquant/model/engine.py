"""Rounds activations before quantized weights, as engines do and the network itself does not.

`Weights.activation_quantizer` says which rounding; here it is put into transformers' modules. Routed experts are not
modules: `GatedWeights` rounds for them.

MLA is rounded where llama.cpp rounds it, which computes neither keys nor values: it multiplies each head's query with
kv_b_proj's rows of keys and the product with the latents, then mixes latents and multiplies them with its rows of
values. So it is queries that are rounded, which needs no other attention, and mixed latents, which does (decision 14).

Shape legend: N samples, T tokens, K keys, H heads, D head dimension, L latent width, V value dimension.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dsquant.kernels.activation_rounding import Rounding, unrounded
from dsquant.model.fused_attention import attend
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights

HEADS_AT_ONCE = 16


@contextmanager
def rounded_linears(skeleton: Skeleton, layer: DecoderLayer, weights: Weights) -> Iterator[None]:
    """Lets a layer's linears, but not its routed experts, round their inputs for as long as the context is open."""
    absorbed = layer.absorbed and layer.absorbed.keys_and_values
    linears = [*layer.attention_linears, *(name for mlp in layer.mlps if mlp.kind != "routed" for name in mlp.linears)]
    roundings = {name: weights.activation_quantizer(f"{name}.weight") for name in linears if name != absorbed}
    with ExitStack() as stack:
        stack.enter_context(_rounded_inputs(skeleton, roundings))
        if layer.absorbed:
            stack.enter_context(_rounded_mla(skeleton, layer, weights))
        yield


@contextmanager
def _rounded_mla(skeleton: Skeleton, layer: DecoderLayer, weights: Weights) -> Iterator[None]:
    """Rounds what meets kv_b_proj's keys and its values."""
    assert layer.absorbed is not None
    queries, keys_and_values = layer.absorbed.queries, layer.absorbed.keys_and_values
    of_queries, of_latents = (weights.activation_quantizer(f"{keys_and_values}.weight", part) for part in (False, True))
    heads, width = layer.absorbed.num_heads, layer.absorbed.key_rows
    attention, projection = skeleton.module(layer.attention_module), skeleton.module(keys_and_values)
    handles = []
    if of_queries is not unrounded:
        rounding = partial(_round_queries, of_queries, heads, width)
        handles.append(skeleton.module(queries).register_forward_hook(rounding))
    if of_latents is not unrounded:
        mixing = _MixedLatents(of_latents, projection, heads, width)
        handles.append(projection.register_forward_pre_hook(mixing.note))
        attention.mix = mixing  # type: ignore[assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        vars(attention).pop("mix", None)


class _MixedLatents:
    """Attention of which latents are the values: mixed, rounded, and only then multiplied with kv_b_proj's values."""

    def __init__(self, rounding: Rounding, projection: nn.Module, num_heads: int, width: int) -> None:
        self._rounding, self._projection, self._num_heads, self._width = rounding, projection, num_heads, width
        self._latents_N1KL = torch.empty(0)

    def note(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Keeps the latents of the attention that comes next, kv_b_proj's input."""
        latents = arguments[0]
        self._latents_N1KL = latents if latents.ndim == 4 else latents.unsqueeze(1)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """Returns [N, T, H, V]; a few heads at a time, as a mixed latent is four times as wide as R1's values."""
        weight_HVL = self._projection.weight.unflatten(0, (self._num_heads, -1))[:, self._width :]  # type: ignore[operator]
        outputs = []
        for first in range(0, self._num_heads, HEADS_AT_ONCE):
            heads = slice(first, first + HEADS_AT_ONCE)
            latents = self._latents_N1KL.expand(-1, query[:, heads].shape[1], -1, -1)
            mixed_NTHL = self._rounding(attend(query[:, heads], key[:, heads], latents, mask, scaling))
            outputs.append(torch.einsum("nthl,hvl->nthv", mixed_NTHL, weight_HVL[heads]))
        self._latents_N1KL = torch.empty(0)
        return torch.cat(outputs, 2)


@contextmanager
def rounded_head(skeleton: Skeleton, table: str, weights: Weights) -> Iterator[None]:
    """Lets the head, whose weight is `table`, round its input for as long as the context is open."""
    with _rounded_inputs(skeleton, {"lm_head": weights.activation_quantizer(table)}):
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
