"""Group-wise integer grids: what spans a group's range, the codes on it, and the error of rounding to them.

The grid of one (row, group) is `w ≈ scale * (code - zero_point)` with `code` in [0, 2**bits - 1]; the symmetric one has
the zero point 2**(bits - 1). The arithmetic is the same to the bit on a CPU and on a GPU: divisions are IEEE divisions
(PyTorch multiplies by the reciprocal where a CUDA tensor is divided by a number).

Shape legend: O out features, I in features, G groups along I, S = group size (I = G * S).
"""

import torch

from dsquant.kernels.values import LARGEST_SCALE, SMALLEST_SCALE, RoundedRows


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


def round_rows(
    weight_OI: torch.Tensor, group_size: int, bits: int, symmetric: bool, shrink_OG: torch.Tensor | float = 1.0
) -> RoundedRows:
    """Plain rounding: the grid spans each group's (shrunk) range and every weight goes to the nearest point.

    Args:
        weight_OI: float32 [O, I].
        group_size: S, on a GPU a power of two.
        bits: of a code.
        symmetric: whether the zero point is constant.
        shrink_OG: factor in (0, 1] on each group's range, float32 [O, G] or a number.

    Returns:
        Codes, scales and zero points, the same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.round_rows(weight_OI, group_size, bits, symmetric, shrink_OG)
    return round_rows_reference(weight_OI, group_size, bits, symmetric, shrink_OG)


def round_rows_reference(
    weight_OI: torch.Tensor, group_size: int, bits: int, symmetric: bool, shrink_OG: torch.Tensor | float = 1.0
) -> RoundedRows:
    """`round_rows` in PyTorch, on any device.

    Args:
        weight_OI: as for `round_rows`.
        group_size: as for `round_rows`.
        bits: as for `round_rows`.
        symmetric: as for `round_rows`.
        shrink_OG: as for `round_rows`.

    Returns:
        As `round_rows`.
    """
    scales_OG, zero_points_OG = grid_parameters(weight_OI, group_size, bits, symmetric, shrink_OG)
    codes_OGS = (weight_OI.unflatten(1, (-1, group_size)) / scales_OG.unsqueeze(-1)).round_()
    codes_OGS.add_(zero_points_OG.unsqueeze(-1)).clamp_(0, 2**bits - 1)
    return RoundedRows(codes_OGS.flatten(1).to(torch.uint8), scales_OG, zero_points_OG.to(torch.uint8))


def dequantize_rows(rounded: RoundedRows, group_size: int, minus_OI: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that codes stand for, or how far it is from another.

    Args:
        rounded: codes, scales and zero points.
        group_size: S, on a GPU a power of two.
        minus_OI: what is subtracted, float32 [O, I]; None is nothing.

    Returns:
        float32 [O, I], the same bits on every device.
    """
    if rounded.codes_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.dequantize_rows(rounded, group_size, minus_OI)
    return dequantize_rows_reference(rounded, group_size, minus_OI)


def dequantize_rows_reference(
    rounded: RoundedRows, group_size: int, minus_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """`dequantize_rows` in PyTorch, on any device.

    Args:
        rounded: as for `dequantize_rows`.
        group_size: as for `dequantize_rows`.
        minus_OI: as for `dequantize_rows`.

    Returns:
        As `dequantize_rows`.
    """
    centred_OGS = rounded.codes_OI.unflatten(1, (-1, group_size)).float()
    centred_OGS -= rounded.zero_points_OG.float().unsqueeze(-1)
    weight_OI = centred_OGS.mul_(rounded.scales_OG.unsqueeze(-1)).flatten(1)
    return weight_OI if minus_OI is None else weight_OI.sub_(minus_OI)


def fake_quantize_difference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, bits: int, symmetric: bool
) -> torch.Tensor:
    """The error of plain rounding with columns scaled, Q(W diag(s)) diag(s)^-1 - W, for each of several scales s.

    Args:
        weight_OI: W, float32 [O, I].
        column_scales_CI: in each row an s, positive float32 [C, I].
        group_size: S, on a GPU a power of two.
        bits: of a code.
        symmetric: whether the zero point is constant.

    Returns:
        float32 [C, O, I], the same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.fake_quantize_difference(weight_OI, column_scales_CI, group_size, bits, symmetric)
    return fake_quantize_difference_reference(weight_OI, column_scales_CI, group_size, bits, symmetric)


def fake_quantize_difference_reference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, bits: int, symmetric: bool
) -> torch.Tensor:
    """`fake_quantize_difference` in PyTorch, on any device.

    Args:
        weight_OI: as for `fake_quantize_difference`.
        column_scales_CI: as for `fake_quantize_difference`.
        group_size: as for `fake_quantize_difference`.
        bits: as for `fake_quantize_difference`.
        symmetric: as for `fake_quantize_difference`.

    Returns:
        As `fake_quantize_difference`.
    """
    differences = []
    for scales_I in column_scales_CI:
        rounded = round_rows_reference(weight_OI * scales_I, group_size, bits, symmetric)
        differences.append(dequantize_rows_reference(rounded, group_size).div_(scales_I).sub_(weight_OI))
    return torch.stack(differences)
