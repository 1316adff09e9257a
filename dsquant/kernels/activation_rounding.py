"""Rounds activations as ggml's CPU kernels do before multiplying with a weight: 8 bits, block by block, if quantized.

Returned are the rounded numbers in float32, not codes: ggml multiplies codes with codes, sums them up exactly in a
block and applies both scales then, which is the same product up to the order of sums. Reference: ggml-quants.c,
`quantize_row_q8_K_ref` and `quantize_row_q8_0_ref`, https://github.com/ggml-org/ggml
"""

from collections.abc import Callable

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""Rounds float32 [..., I]; I is a multiple of its block."""

Q8_K_BLOCK = 256
Q8_0_BLOCK = 32


def unrounded(values: torch.Tensor) -> torch.Tensor:
    """For F32 weights, and in engines that do not round: returns the values themselves."""
    return values


def q8_k(values: torch.Tensor) -> torch.Tensor:
    """For K-quants, blocks of 256: the largest magnitude becomes 127 (-127 in ggml, which gives the same numbers)."""
    blocks = values.unflatten(-1, (-1, Q8_K_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # 127 / tensor would be 127 times a rounded reciprocal
    scale = torch.where(inverse.isinf(), 0.0, 1 / inverse)
    return _nothing_in_empty_blocks(blocks * inverse, inverse).round_().mul_(scale).flatten(-2)


def q8_0(values: torch.Tensor) -> torch.Tensor:
    """For all other types, blocks of 32: halves away from zero, the scale stored in F16."""
    blocks = values.unflatten(-1, (-1, Q8_0_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = 1 / scale
    codes = _nothing_in_empty_blocks(blocks * inverse, inverse)
    whole = codes.trunc()
    whole += codes.sub_(whole).mul_(2).trunc_()
    return whole.mul_(scale.half().float()).flatten(-2)


def _nothing_in_empty_blocks(codes: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Codes of blocks without a number but zero, 0 * infinity, are zero; NaN elsewhere stays."""
    return codes.masked_fill_(inverse.isinf(), 0.0)


def f16(values: torch.Tensor) -> torch.Tensor:
    """For F16 weights: rounds to the nearest number of that type."""
    return values.half().float()


def bf16(values: torch.Tensor) -> torch.Tensor:
    """For BF16 weights: rounds to the nearest number of that type."""
    return values.bfloat16().float()


def rounding_of_type(name: str, block: int) -> Rounding:
    """Returns the rounding for weights of a ggml type, such as Q4_K, by the weights of one of its blocks.

    256 of K- and I-quants, 32 of the others, 1 of F32, F16 and BF16.
    """
    if block == 1:
        return {"F16": f16, "BF16": bf16}.get(name, unrounded)
    return q8_k if block == Q8_K_BLOCK else q8_0
