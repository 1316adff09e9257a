"""Parameters of ggml's blocks, and error-compensating rounding of columns whose blocks' parameters are searched.

The float16 factors of a super-block are found before its first column is rounded. The scale and the offset of each of
its blocks are searched again once the columns before it are rounded, in units of these factors; the old ones compete.

Shape legend: S columns, O rows of a weight, I columns of it, C candidates, B blocks of columns.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.compensation import compensate_group
from dsquant.kernels.scale_search import BlockShape, affine_search, stored_scales, symmetric_search
from dsquant.kernels.values import CompensatedBlocks, Kind, Parameters, joined_blocks

# Weights that are searched together on a CPU: what they need stays in a core's cache.
WEIGHTS_AT_ONCE = 2**17


def block_parameters(
    weight_OI: torch.Tensor, importance_OI: torch.Tensor, shape: BlockShape, ratios: Sequence[float]
) -> Parameters:
    """Searches scales and offsets of a weight's blocks, [C, O, B]; each ratio scales the float16 factors."""
    weight_SW, importance_SW = (part.reshape(-1, shape.group_size) for part in (weight_OI, importance_OI))
    at_once = len(weight_SW) if weight_SW.is_cuda else WEIGHTS_AT_ONCE // shape.group_size
    parts = [
        _found(*part, shape, ratios)
        for part in zip(weight_SW.split(at_once), importance_SW.split(at_once), strict=True)
    ]
    rows = (len(ratios), len(weight_OI), -1)
    scales, zero_points, *supers = (torch.cat(same, 1).reshape(rows) for same in zip(*parts, strict=True))
    return Parameters(scales, zero_points, tuple(supers))


def _found(
    weight_SW: torch.Tensor, importance_SW: torch.Tensor, shape: BlockShape, ratios: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """Scales, zero points and super-scales, each [C, super-blocks, blocks of one]."""
    ratios_C11 = weight_SW.new_tensor(ratios).view(-1, 1, 1)
    supers, products = [], []
    for factor_S1, codes_SB in stored_scales(weight_SW, importance_SW, shape).factors:
        super_CSB = (factor_S1.float() * ratios_C11).half().float().expand(-1, -1, codes_SB.shape[1])
        supers.append(super_CSB)
        products.append(super_CSB * codes_SB)
    if len(products) == 1:
        products.append(torch.full_like(products[0], shape.zero_point))
    return (*products, *(supers if shape.scale_codes else ()))


def compensate_blocks(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, shape: BlockShape,
    ratios: Sequence[float],
) -> CompensatedBlocks:  # fmt: skip
    """Rounds columns one after the other in blocks whose parameters are searched as they are reached.

    The columns, float32 [S, O], are a super-block, or whole blocks of types that have none, at most 256. Of
    `factor_SS`, their part of U (`compensation`), nothing below the diagonal is read. `importance_S`, positive, weighs
    squared errors in the searches; each of at most three ratios scales what they find, 1 the first.
    """
    if weight_SO.is_cuda:
        from dsquant.kernels import super_blocks_triton

        return super_blocks_triton.compensate_blocks(weight_SO, factor_SS, importance_S, shape, ratios)
    return compensate_blocks_reference(weight_SO, factor_SS, importance_S, shape, ratios)


def compensate_blocks_reference(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, importance_S: torch.Tensor, shape: BlockShape,
    ratios: Sequence[float],
) -> CompensatedBlocks:  # fmt: skip
    """`compensate_blocks` in PyTorch, on any device."""
    working_SO, importance_SO = weight_SO.clone(), importance_S.unsqueeze(1).expand(weight_SO.shape)
    before = block_parameters(weight_SO.T, importance_SO.T, shape, (1.0,)) if shape.scale_codes else None
    rounded, found = [], []
    for start in range(0, len(working_SO), shape.size):
        stop = start + shape.size
        block = working_SO[start:stop], importance_SO[start:stop]
        if before is None:
            tried = block_parameters(block[0].T, block[1].T, shape, ratios)
        else:
            tried = _refitted(*block, _block_of(before, start // shape.size), shape, ratios)
        part = compensate_group(block[0], factor_SS[start:stop, start:stop], tried, shape.levels)
        working_SO[stop:].addmm_(factor_SS[start:stop, stop:].T, part.errors_SO, alpha=-1)
        rounded.append(part)
        found.append(tried.chosen(part.chosen_O.unsqueeze(1)))
    codes_SO, errors_SO = (torch.cat([getattr(part, name) for part in rounded]) for name in ("codes_SO", "errors_SO"))
    return CompensatedBlocks(codes_SO, errors_SO, joined_blocks(found))


def _block_of(found: Parameters, block: int) -> Parameters:
    """The first candidate of one block, [O, 1]."""
    return found.each(lambda part: part[0, :, block : block + 1])


def _refitted(
    weight_SO: torch.Tensor, importance_SO: torch.Tensor, found: Parameters, shape: BlockShape, ratios: Sequence[float]
) -> Parameters:
    """Candidates [C, O, 1] for one block, in units of its super-block's factors: one for each ratio, then the old."""
    scale_1O, zero_point_1O = found.scales.T, found.zero_points.T
    factors = [part[:, 0] for part in found.super_scales]
    ratios_C1 = weight_SO.new_tensor(ratios).unsqueeze(1)
    if shape.levels.kind == Kind.OFFSETS:
        scale_O, code_O, mean_O = affine_search(weight_SO, importance_SO, shape.levels.largest)
        scales_CO = _multiples(scale_O * ratios_C1, factors[0], shape)
        zeros_CO = _multiples((scales_CO * code_O - mean_O).clamp_(min=0), factors[1], shape)
    else:
        scales_CO = _multiples(symmetric_search(weight_SO, importance_SO, shape.levels) * ratios_C1, factors[0], shape)
        zeros_CO = zero_point_1O.expand_as(scales_CO)
    scales = torch.cat((scales_CO, scale_1O)).unsqueeze(2)
    zero_points = torch.cat((zeros_CO, zero_point_1O)).unsqueeze(2)
    return Parameters(scales, zero_points, tuple(part.expand(len(scales), -1, -1) for part in found.super_scales))


def _multiples(values_CO: torch.Tensor, factor_O: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """The nearest whole multiples of the factors that can be stored."""
    assert shape.scale_codes is not None
    codes_CO = (values_CO / torch.where(factor_O != 0, factor_O, torch.inf)).round_().clamp_(*shape.scale_codes)
    return codes_CO.mul_(factor_O)
