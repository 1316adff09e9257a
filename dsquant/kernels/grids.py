"""Group-wise integer grids: what spans a group's range, the codes on it, and the error of rounding to them.

The grid of one (row, group) is `w ≈ scale * (code - zero_point)` with `code` in [0, 2**bits - 1]; the symmetric one has
the zero point 2**(bits - 1). The arithmetic is the same to the bit on a CPU and on a GPU: divisions are IEEE divisions
(PyTorch multiplies by the reciprocal where a CUDA tensor is divided by a number).

Shape legend: O out features, I in features, G groups along I, S = group size (I = G * S).
"""

import torch

# What float16 and bfloat16 both hold with bfloat16's full precision.
SMALLEST_SCALE = 2.0**-16
LARGEST_SCALE = 65280.0


def storable_scales(scales: torch.Tensor) -> torch.Tensor:
    """Rounds scales to values that float16 and bfloat16 both hold.

    Args:
        scales: positive float32, any shape.

    Returns:
        float32 of the same shape, at least `SMALLEST_SCALE`.
    """
    return scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).float()


def grid_parameters(
    weight_OI: torch.Tensor, group_size: int, bits: int, symmetric: bool, shrink_OG: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points that span each group's range, times `shrink_OG`.

    Asymmetric: scale = (max - min) / (2**bits - 1), zero point = round(-min / scale), the range widened to hold 0
    (AutoAWQ's `pseudo_quantize_tensor`). Symmetric: scale = max|w| / ((2**bits - 1) / 2), zero point 2**(bits - 1)
    (compressed-tensors' `calculate_qparams`).

    Args:
        weight_OI: float32 [O, I].
        group_size: S.
        bits: of a code.
        symmetric: whether the zero point is constant.
        shrink_OG: factor in (0, 1] on each group's range, [O, G] or a number.

    Returns:
        scales float32 [O, G] and zero points float32 [O, G] holding integers.
    """
    weight_OGS = weight_OI.unflatten(1, (-1, group_size))
    largest = 2**bits - 1
    if symmetric:
        extent_OG = weight_OGS.abs().amax(-1) * shrink_OG
        scales_OG = storable_scales(extent_OG / extent_OG.new_full((), largest / 2))
        return scales_OG, torch.full_like(scales_OG, 2 ** (bits - 1))
    low_OG = weight_OGS.amin(-1).clamp(max=0) * shrink_OG
    high_OG = weight_OGS.amax(-1).clamp(min=0) * shrink_OG
    scales_OG = storable_scales((high_OG - low_OG) / low_OG.new_full((), largest))
    return scales_OG, (-low_OG / scales_OG).round().clamp(0, largest)
