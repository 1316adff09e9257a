"""Rounding to the levels of a scheme, and the parameters of integer groups.

The arithmetic is the same to the bit on a CPU and on a GPU: divisions are IEEE divisions (PyTorch multiplies by the
reciprocal where a CUDA tensor is divided by a number).

Shape legend: C candidates, O out features, I in features, B blocks along I that share a scale, S = block size
(I = B * S).
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.values import LARGEST_SCALE, SMALLEST_SCALE, Kind, Levels, Parameters, table_on


def storable_scales(scales: torch.Tensor) -> torch.Tensor:
    """Rounds float32 scales to values that float16 and bfloat16 both hold, none nearer to 0 than `SMALLEST_SCALE`."""
    sizes = scales.abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE).to(torch.bfloat16).float()
    return torch.where(scales < 0, -sizes, sizes)


def range_parameters(
    weight_OI: torch.Tensor, group_size: int, levels: Levels, clip_ratios: Sequence[float]
) -> Parameters:
    """Returns scales and zero points [C, O, B] of integers that span each group's range, times each of several ratios.

    Asymmetric: scale = (max - min) / largest code, zero point = round(-min / scale), the range widened to hold 0
    (AutoAWQ's `pseudo_quantize_tensor`). Symmetric: scale = max|w| / (largest code / 2), zero point (largest + 1) / 2
    (compressed-tensors' `calculate_qparams`); there all ratios but the first negate the scale of a group whose largest
    weight is positive: code 0 reaches one step farther than the largest code (as AutoRound's full range), and a
    negative ratio gives a group the other sign. The weight is float32 [O, I] of any strides; on a GPU the group size is
    a power of two. The same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.range_parameters(weight_OI, group_size, levels, clip_ratios)
    return range_parameters_reference(weight_OI, group_size, levels, clip_ratios)


def range_parameters_reference(
    weight_OI: torch.Tensor, group_size: int, levels: Levels, clip_ratios: Sequence[float]
) -> Parameters:
    """`range_parameters` in PyTorch, on any device."""
    weight_OGS = weight_OI.unflatten(1, (-1, group_size))
    ratios_C11 = weight_OI.new_tensor(clip_ratios).view(-1, 1, 1)
    largest = weight_OI.new_tensor(float(levels.largest))
    if levels.symmetric:
        scales_COG = storable_scales(weight_OGS.abs().amax(-1) * ratios_C11 / (largest / 2))
        positive_OG = weight_OGS.amax(-1) > -weight_OGS.amin(-1)
        scales_COG[1:] = torch.where(positive_OG, -scales_COG[1:], scales_COG[1:])
        return Parameters(scales_COG, torch.full_like(scales_COG, levels.middle))
    low_COG = weight_OGS.amin(-1).clamp_(max=0) * ratios_C11
    high_COG = weight_OGS.amax(-1).clamp_(min=0) * ratios_C11
    scales_COG = storable_scales((high_COG - low_COG) / largest)
    return Parameters(scales_COG, (-low_COG / scales_COG).round_().clamp_(0, levels.largest))


def nearest_codes(
    weight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """Returns the codes of the nearest levels, whole numbers in float32; scales and zero points are broadcast.

    A block whose scale is 0 has one level only, and code 0, the middle one, or that of a table's 0. Zero points have
    the scales' dtype, or are offsets.
    """
    if levels.kind != Kind.INTEGERS or levels.fixed:  # other integers have no scale of 0
        scales = torch.where(scales != 0, scales, torch.inf)
    if levels.kind == Kind.INTEGERS:
        return (weight / scales).round_().add_(zero_points).clamp_(0, levels.largest)
    if levels.kind == Kind.OFFSETS:
        return ((weight + zero_points) / scales).round_().clamp_(0, levels.largest)
    return _codes_of_table(weight / scales, levels)


def _codes_of_table(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    return torch.bucketize(values.contiguous(), table_on(values.device, levels)[levels.largest + 1 :]).float()


def nearest_levels(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns the levels next to values in units of the scale, float32; may overwrite the values."""
    if levels.kind == Kind.TABLE:
        return values_of_codes(_codes_of_table(values, levels), levels)
    return values.round_().clamp_(0, levels.largest)


def values_of_codes(codes: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns the values of codes, of any dtype, in units of the scale, float32."""
    return table_on(codes.device, levels)[codes.int()] if levels.kind == Kind.TABLE else codes.float()


def codes_of_values(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Undoes `values_of_codes`: uint8."""
    codes = _codes_of_table(values, levels) if levels.kind == Kind.TABLE else values
    return codes.to(torch.uint8)


def weights_of_codes(
    codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, levels: Levels
) -> torch.Tensor:
    """Returns the float32 weights of codes, whole numbers in float32; scales and zero points are broadcast."""
    if levels.kind == Kind.INTEGERS:
        return (codes - zero_points).mul_(scales)
    weights = values_of_codes(codes, levels) * scales
    return weights.sub_(zero_points) if levels.kind == Kind.OFFSETS else weights


def round_rows(weight_OI: torch.Tensor, parameters: Parameters, levels: Levels) -> torch.Tensor:
    """Rounds each weight [O, I] to the nearest level of its block [O, B]: codes, uint8 [O, I].

    On a GPU, I / B is a power of two. The same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.round_rows(weight_OI, parameters, levels)
    return round_rows_reference(weight_OI, parameters, levels)


def round_rows_reference(weight_OI: torch.Tensor, parameters: Parameters, levels: Levels) -> torch.Tensor:
    """`round_rows` in PyTorch, on any device."""
    scales_OB1, zero_points_OB1 = parameters.scales.unsqueeze(-1), parameters.zero_points.float().unsqueeze(-1)
    weight_OBS = weight_OI.unflatten(1, (parameters.scales.shape[1], -1))
    return nearest_codes(weight_OBS, scales_OB1, zero_points_OB1, levels).flatten(1).to(torch.uint8)


def round_to_range(weight_OI: torch.Tensor, group_size: int, levels: Levels) -> tuple[torch.Tensor, Parameters]:
    """Rounds to integers that span each group's range: codes, uint8 [O, I], and parameters [O, B].

    On a GPU in one pass; there the group size is a power of two. The same bits on every device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.round_to_range(weight_OI, group_size, levels)
    return round_to_range_reference(weight_OI, group_size, levels)


def round_to_range_reference(
    weight_OI: torch.Tensor, group_size: int, levels: Levels
) -> tuple[torch.Tensor, Parameters]:
    """`round_to_range` in PyTorch, on any device."""
    parameters = range_parameters_reference(weight_OI, group_size, levels, (1.0,)).each(lambda part: part[0])
    return round_rows_reference(weight_OI, parameters, levels), parameters


def dequantize_rows(
    codes_OI: torch.Tensor, parameters: Parameters, levels: Levels, minus_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the weight that codes stand for, float32 [O, I], or how far it is from another, `minus_OI`.

    On a GPU, I / B is a power of two. The same bits on every device.
    """
    if codes_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.dequantize_rows(codes_OI, parameters, levels, minus_OI)
    return dequantize_rows_reference(codes_OI, parameters, levels, minus_OI)


def dequantize_rows_reference(
    codes_OI: torch.Tensor, parameters: Parameters, levels: Levels, minus_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """`dequantize_rows` in PyTorch, on any device."""
    scales_OB1, zero_points_OB1 = parameters.scales.unsqueeze(-1), parameters.zero_points.float().unsqueeze(-1)
    codes_OBS = codes_OI.unflatten(1, (parameters.scales.shape[1], -1)).float()
    weight_OI = weights_of_codes(codes_OBS, scales_OB1, zero_points_OB1, levels).flatten(1)
    return weight_OI if minus_OI is None else weight_OI.sub_(minus_OI)


def fake_quantize_difference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, levels: Levels
) -> torch.Tensor:
    """Returns errors of plain rounding with columns scaled by s, Q(W diag(s)) diag(s)^-1 - W, float32 [C, O, I].

    Levels are integers that span each group's range; on a GPU the group size is a power of two. The same bits on every
    device.
    """
    if weight_OI.is_cuda:
        from dsquant.kernels import rounding_triton

        return rounding_triton.fake_quantize_difference(weight_OI, column_scales_CI, group_size, levels)
    return fake_quantize_difference_reference(weight_OI, column_scales_CI, group_size, levels)


def fake_quantize_difference_reference(
    weight_OI: torch.Tensor, column_scales_CI: torch.Tensor, group_size: int, levels: Levels
) -> torch.Tensor:
    """`fake_quantize_difference` in PyTorch, on any device."""
    differences = []
    for scales_I in column_scales_CI:
        rounded = round_to_range_reference(weight_OI * scales_I, group_size, levels)
        differences.append(dequantize_rows_reference(*rounded, levels).div_(scales_I).sub_(weight_OI))
    return torch.stack(differences)
