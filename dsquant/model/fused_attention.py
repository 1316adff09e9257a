"""Replaces transformers' attention and linears: the fused kernel, and products that threads share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsquant.kernels.products import apply_linear
from dsquant.kernels.threads import blocks_of, side_by_side
from dsquant.model.sparse_attention import seen_keys

ATTENTION = "dsquant_fused"
"""The name under which transformers knows `fused_attention`."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Computes causal attention with PyTorch's fused kernel: [batch, tokens, heads, value dimension].

    On a GPU, where matrix products may be fast rather than exact (kernels.precision), it computes in bfloat16. MLA's
    values are narrower than its keys (128 against 192 in R1), which the fused CPU kernel refuses: it would fall back to
    a full score matrix (2 GiB for 2,048 tokens and 128 heads). Padding the narrower with zeros keeps it fused.

    Query, key and value are [batch, heads or key-value heads, tokens, dimension]. The mask, bool [batch, 1, tokens,
    keys], is True where a key is seen; None for samples of equal length without padding, whose queries see the keys up
    to themselves. `scaling` is a factor on the scores.
    """
    dtype, width = query.dtype, value.shape[-1]
    if query.is_cuda and torch.get_float32_matmul_precision() != "highest":  # what the flash kernel takes
        query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
    causal = attention_mask is None and query.shape[2] > 1
    grouped = key.shape[1] != query.shape[1]
    if query.shape[2] > 1:  # a single query's score matrix is small whatever the kernel
        widest = max(query.shape[-1], width)
        query, key, value = (F.pad(part, (0, widest - part.shape[-1])) for part in (query, key, value))
    output = _shared_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    return output[..., :width].transpose(1, 2).to(dtype).contiguous()


def _shared_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **how: Any
) -> torch.Tensor:
    """PyTorch's fused kernel on blocks of key-value heads that a job's threads share."""
    num_heads = key.shape[1]
    work = query.numel() * key.shape[2] // num_heads
    blocks = blocks_of(num_heads, work, least=1, alignment=1)
    if query.is_cuda and torch.is_grad_enabled():
        output: torch.Tensor = SameEveryTime.apply(query, key, value, mask, how)  # type: ignore[no-untyped-call]
        return output
    if query.is_cuda or len(blocks) == 1:
        return F.scaled_dot_product_attention(query, key, value, mask, **how)
    queries = query.unflatten(1, (num_heads, -1))

    def attend_to(block: slice) -> torch.Tensor:
        query_heads = queries[:, block].flatten(1, 2)
        return F.scaled_dot_product_attention(query_heads, key[:, block], value[:, block], mask, **how)

    return torch.cat(side_by_side(attend_to, blocks), 1)


class SameEveryTime(torch.autograd.Function):
    """PyTorch's fused kernel with gradients that are the same bits every time: on a GPU its own add up a query's over
    the keys in whatever order their blocks are done. Computes the output again for them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        """Gets query, key, value, mask and what else the kernel is told."""
        *tensors, ctx.how = arguments
        ctx.save_for_backward(*tensors)
        return F.scaled_dot_product_attention(*tensors, **ctx.how)

    @staticmethod
    def backward(ctx: Any, *of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of query, key and value."""
        *inputs, mask = ctx.saved_tensors
        query, key, value = (part.detach().requires_grad_() for part in inputs)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            with torch.enable_grad():
                output = F.scaled_dot_product_attention(query, key, value, mask, **ctx.how)
            return *torch.autograd.grad(output, [query, key, value], of_output), None, None
        finally:
            torch.use_deterministic_algorithms(before)


class SharedLinear(nn.Linear):
    """transformers' linears, whose products a job's threads share."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiplies with the weight: [..., I] to [..., O]."""
        return apply_linear(inputs, self.weight, self.bias)


def fused_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Called by transformers as attention: `attend`, or what an engine has put into the module's place `mix`.

    Arguments are as in `attend`; of the others, sparse attention gives `indices` of the keys that are seen.
    Returns the output [batch, tokens, heads, value dimension], and no
    weights.
    """
    if "indices" in kwargs:
        attention_mask = seen_keys(kwargs["indices"], attention_mask, key.shape[2])
    mix = getattr(module, "mix", None)
    if mix is not None:
        return mix(query, key, attention_mask, scaling), None
    return attend(query, key, value, attention_mask, scaling), None
