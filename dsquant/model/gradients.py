"""Takes gradients back through a decoder whose weights lie on disk, a layer and an expert in memory at a time.

They are gradients of the log-likelihood of tokens that the model itself predicts: drawn from its predictions, not from
the text. The square of their product with a small error of the hidden states is, on average over draws, twice the KL
divergence that the error causes, since the Fisher information is the divergence's second derivative (Martens, arXiv
1412.1193, section 5). Each token's own product is squared: what errors of several tokens do to one prediction together
is left out.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens, V rows of a part of the vocabulary, K experts of
a token, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import RoutingTap, Skeleton
from dsquant.model.streaming import head_name, layer_outputs, loaded, table_parts
from dsquant.model.structure import DecoderLayer
from dsquant.source.weights import Weights

# The predictions' sum is 1 up to rounding: draws stay below it.
_LARGEST_DRAW = 1 - 2**-16


@dataclass(frozen=True)
class RoutedGradients:
    """The gradients that a layer's routed experts pass back."""

    inputs: Activations
    """Of what the experts read, [N, T, H]."""
    share_RE: torch.Tensor
    """float32 [R, E]: of each expert's share in a token; 0 where it has none."""


@dataclass(frozen=True)
class LayerStates:
    """A layer's hidden states and their gradients, all [N, T, H]."""

    inputs: Activations
    gradients: Activations
    """Of its outputs, then of its inputs."""
    attended: Activations
    """Gets the gradients of the hidden states behind attention."""


@dataclass
class _Tapped:
    """A layer's hidden states inside a forward that is differentiated."""

    attended: list[torch.Tensor] = field(default_factory=list)
    """Behind attention, [N, T, H]."""
    mlp_input: list[torch.Tensor] = field(default_factory=list)
    """Read by the MLPs, [N, T, H]."""
    routing: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Experts and shares of the tokens, [R, K]."""


def head_gradients(
    skeleton: Skeleton, weights: Weights, hidden_NTH: torch.Tensor, draws: torch.Generator
) -> torch.Tensor:
    """Returns the gradients of the last hidden states, float32 [N, T, H] as they are, for one drawn token behind each.

    `draws` is on the CPU; the vocabulary passes through memory twice, in parts.
    """
    hidden_NTH = hidden_NTH.requires_grad_()
    with loaded(skeleton, "model.norm", weights) as norm, torch.enable_grad():
        normed_NTH = norm(hidden_NTH)
    with torch.no_grad(), fast_matmuls(weights.device):
        of_normed_RH = _likelihood_gradients(skeleton, weights, normed_NTH.detach().flatten(0, 1), draws)
    (found_NTH,) = torch.autograd.grad(normed_NTH, hidden_NTH, of_normed_RH.view_as(normed_NTH))
    return found_NTH


def _likelihood_gradients(
    skeleton: Skeleton, weights: Weights, normed_RH: torch.Tensor, draws: torch.Generator
) -> torch.Tensor:
    """The head's rows as the model expects them, minus that of the drawn token."""
    name, device = head_name(skeleton), normed_RH.device
    log_sum_R = log_sums(skeleton, weights, normed_RH)
    left_R = torch.rand(len(normed_RH), generator=draws).clamp(max=_LARGEST_DRAW).to(device)
    gradient_RH = torch.zeros_like(normed_RH)
    for _, table_VH in table_parts(weights, name):
        predicted_RV = apply_linear(normed_RH, table_VH).sub_(log_sum_R.unsqueeze(1)).exp_()
        until_RV = predicted_RV.cumsum(1)
        drawn_R = torch.where((left_R >= 0) & (left_R < until_RV[:, -1]))[0]
        place_R = torch.searchsorted(until_RV[drawn_R], left_R[drawn_R].unsqueeze(1), right=True).squeeze(1)
        left_R -= until_RV[:, -1]
        left_R[drawn_R] = -1.0
        predicted_RV[drawn_R, place_R.clamp(max=predicted_RV.shape[1] - 1)] -= 1
        gradient_RH += predicted_RV @ table_VH
    return gradient_RH


def log_sums(skeleton: Skeleton, weights: Weights, normed_RH: torch.Tensor) -> torch.Tensor:
    """Returns the logarithms of the sums of the exponentiated scores of all tokens of the vocabulary, float32 [R]."""
    found_R = torch.full((len(normed_RH),), -torch.inf, device=normed_RH.device)
    for _, table_VH in table_parts(weights, head_name(skeleton)):
        found_R = torch.logaddexp(found_R, apply_linear(normed_RH, table_VH).logsumexp(1))
    return found_R


def expert_gradients(
    skeleton: Skeleton, expert: GatedWeights, inputs_RH: torch.Tensor, share_R: torch.Tensor, outputs_RH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of an expert's inputs [R, H] and of its shares in their tokens [R], float32.

    `outputs_RH` are those of the layer's outputs.
    """
    inputs_RH = inputs_RH.requires_grad_()
    with torch.enable_grad(), fast_matmuls(inputs_RH.device):
        gated_RW = skeleton.activation(F.linear(inputs_RH, expert.gate_WH)) * F.linear(inputs_RH, expert.up_WH)
        contribution_RH = F.linear(gated_RW, expert.down_HW)
        (found_RH,) = torch.autograd.grad(contribution_RH, inputs_RH, outputs_RH * share_R.unsqueeze(1))
    return found_RH, (contribution_RH.detach() * outputs_RH).sum(1)


def gated_gradients(
    skeleton: Skeleton, weights: GatedWeights, inputs_RH: torch.Tensor, of_outputs_RH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of what gate and up put out [R, W], float32, from those of a gated MLP's outputs."""
    with fast_matmuls(inputs_RH.device):
        gate_RW, up_RW = (F.linear(inputs_RH, part_WH).requires_grad_() for part_WH in (weights.gate_WH, weights.up_WH))
        with torch.enable_grad():
            gated_RW = skeleton.activation(gate_RW) * up_RW
        of_gate_RW, of_up_RW = torch.autograd.grad(gated_RW, [gate_RW, up_RW], of_outputs_RH @ weights.down_HW)
    return of_gate_RW, of_up_RW


def layer_gradients(
    skeleton: Skeleton,
    layer: DecoderLayer,
    weights: Weights,
    states: LayerStates,
    routed: RoutedGradients | None,
    batches: Sequence[tuple[int, int]],
) -> None:
    """Takes gradients of a layer's outputs back to its inputs, batch by batch.

    A batch is its first sample and the one behind its last. `routed` is what experts pass back; None where there are
    none.
    """
    with loaded(skeleton, layer.prefix, weights) as module, fast_matmuls(weights.device):
        for start, stop in batches:
            hidden_NTH = states.inputs.samples(start, stop).requires_grad_()
            with _tapped(skeleton, layer) as tapped, torch.enable_grad():
                found = [layer_outputs(skeleton, module, hidden_NTH)]
            of_found = [states.gradients.samples(start, stop)]
            if routed is not None:
                (mlp_input_NTH,), ((expert_RK, share_RK),) = tapped.mlp_input, tapped.routing
                rows = slice(start * states.inputs.shape[1], stop * states.inputs.shape[1])
                found += [mlp_input_NTH, share_RK]
                of_found += [routed.inputs.samples(start, stop), routed.share_RE[rows].gather(1, expert_RK.long())]
            of_attended_NTH, of_hidden_NTH = torch.autograd.grad(found, [*tapped.attended, hidden_NTH], of_found)
            states.attended.set_samples(start, of_attended_NTH)
            states.gradients.set_samples(start, of_hidden_NTH)


def attention_gradients(
    skeleton: Skeleton,
    layer: DecoderLayer,
    weights: Weights,
    hidden_NTH: torch.Tensor,
    of_attended_NTH: torch.Tensor,
    linears: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Returns the gradients of what attention's linears put out, float32 [R, O], from those of the hidden states behind
    attention."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output_NTO: torch.Tensor) -> None:
            found[name] = output_NTO

        return hook

    with loaded(skeleton, layer.prefix, weights) as module, fast_matmuls(weights.device):
        handles = [skeleton.module(name).register_forward_hook(keep(name)) for name in linears]
        try:
            with _tapped(skeleton, layer) as tapped, torch.enable_grad():
                layer_outputs(skeleton, module, hidden_NTH.requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        gradients = torch.autograd.grad(tapped.attended, list(found.values()), [of_attended_NTH])
    return {name: gradient.flatten(0, -2) for name, gradient in zip(found, gradients, strict=True)}


@contextmanager
def _tapped(skeleton: Skeleton, layer: DecoderLayer) -> Iterator[_Tapped]:
    """Keeps hidden states of a layer's next forward, with what they were computed from."""
    found = _Tapped()

    def keep(kept: list[torch.Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            kept.append(arguments[0] if arguments else named["hidden_states"])

        return hook

    handles = [
        skeleton.module(name).register_forward_pre_hook(keep(kept), with_kwargs=True)
        for name, kept in ((layer.norm, found.attended), (layer.mlp_module, found.mlp_input))
    ]
    if layer.router is not None:
        tap = skeleton.module(layer.experts_module)
        assert isinstance(tap, RoutingTap)
        tap.sink = lambda expert_TK, share_TK: found.routing.append((expert_TK, share_TK))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
