"""The routed experts of a layer in training: two grouped products in bfloat16, whatever the tokens of each.

Shape legend: R tokens, K experts of a token, E experts, H hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BFLOAT16 = "bfloat16"
"""Under this transformers finds `experts_forward`."""


def count_loads(experts: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """Notes how many tokens each expert gets; runs before the experts do."""
    experts.loads.copy_(loads_of(arguments[1], len(experts.loads)))


def loads_of(chosen_RK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens chose each expert: int64 [E], without asking the GPU for a size."""
    return (chosen_RK.flatten()[:, None] == torch.arange(num_experts, device=chosen_RK.device)).sum(0)


class _Dispatch(torch.autograd.Function):
    """Rows for each choice of an expert, in the order of experts; backwards every token sums its own."""

    @staticmethod
    def forward(context: Any, rows_RH: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(places)
        context.shape = (len(rows_RH), -1, rows_RH.shape[1])
        return rows_RH[order // (len(order) // len(rows_RH))]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (places,) = context.saved_tensors
        return gradient[places].view(context.shape).sum(1), None, None


class _Combine(torch.autograd.Function):
    """Every token sums its rows; backwards each of them gets the token's gradient."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, order: torch.Tensor, places: torch.Tensor, num: int) -> torch.Tensor:
        context.save_for_backward(order)
        return rows[places].view(num, -1, rows.shape[1]).sum(1)

    @staticmethod
    def backward(context: Any, gradient_RH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (order,) = context.saved_tensors
        return gradient_RH[order // (len(order) // len(gradient_RH))], None, None, None


def experts_forward(
    experts: Any, hidden_RH: torch.Tensor, chosen_RK: torch.Tensor, shares_RK: torch.Tensor
) -> torch.Tensor:
    """What transformers' experts compute. Its own grouped products keep float32 weights, which no fast kernel takes."""
    order = chosen_RK.flatten().argsort()
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = loads_of(chosen_RK, experts.num_experts).cumsum(0).to(torch.int32)
    gate_up, down = (weight.bfloat16().transpose(1, 2) for weight in (experts.gate_up_proj, experts.down_proj))
    rows = _Dispatch.apply(hidden_RH.bfloat16(), order, places)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    shares = shares_RK.flatten()[order].unsqueeze(1)
    outputs = F.grouped_mm((F.silu(gate) * up * shares).bfloat16(), down, offs=ends)
    return _Combine.apply(outputs, order, places, len(hidden_RH)).to(hidden_RH.dtype)


def use_bfloat16_experts(model: Any) -> None:
    """Has a transformers model's experts run by `experts_forward`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BFLOAT16, experts_forward)
    model.set_experts_implementation(BFLOAT16)
