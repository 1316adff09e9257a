"""Error-compensating rounding of one group: GPTQ's column loop under every shrink of the range, each row's best kept.

GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of the inverse Gram matrix,
rounding column j with error e changes column k > j by -e / U_jj * U_jk and costs (e / U_jj)^2 of output error.

Shape legend: S columns of the group, O rows of the weight, C shrinks, P = C * O.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.grids import grid_parameters
from dsquant.kernels.values import CompensatedGroup

# Columns that are updated one by one before the rest of the group is, by one product.
COLUMNS_AT_ONCE = 16


def compensate_group(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> CompensatedGroup:
    """Rounds a group's columns one after the other under every shrink and keeps each row's best.

    Args:
        weight_SO: float32 [S, O], the group's columns in the order of rounding, S = 16, 32, 64 or 128.
        factor_SS: float32 [S, S], the group's block of U; what lies below the diagonal is not read.
        shrinks: factors in (0, 1] on the range that each row's grid spans.
        bits: of a code.
        symmetric: whether the zero point is constant.

    Returns:
        For each row the result with the least sum of squared errors, the first of equals.
    """
    if weight_SO.is_cuda:
        from dsquant.kernels import compensation_triton

        return compensation_triton.compensate_group(weight_SO, factor_SS, shrinks, bits, symmetric)
    return compensate_group_reference(weight_SO, factor_SS, shrinks, bits, symmetric)


def compensate_group_reference(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, shrinks: Sequence[float], bits: int, symmetric: bool
) -> CompensatedGroup:
    """`compensate_group` in PyTorch, on any device.

    Args:
        weight_SO: as for `compensate_group`.
        factor_SS: as for `compensate_group`.
        shrinks: as for `compensate_group`.
        bits: as for `compensate_group`.
        symmetric: as for `compensate_group`.

    Returns:
        As `compensate_group`.
    """
    size, num_rows = weight_SO.shape
    shrinks_P1 = weight_SO.new_tensor(shrinks).repeat_interleave(num_rows).unsqueeze(1)
    working_SP = weight_SO.repeat(1, len(shrinks))
    grids = grid_parameters(working_SP.T, size, bits, symmetric, shrinks_P1)
    scales_P, zero_points_P = (part_P1[:, 0] for part_P1 in grids)
    codes_SP, errors_SP = torch.empty_like(working_SP), torch.empty_like(working_SP)
    for start in range(0, size, COLUMNS_AT_ONCE):
        stop = start + COLUMNS_AT_ONCE
        for column in range(start, stop):
            values_P = working_SP[column]
            codes_P = (values_P / scales_P).round_().add_(zero_points_P).clamp_(0, 2**bits - 1)
            rounded_P = (codes_P - zero_points_P).mul_(scales_P)
            errors_P = (values_P - rounded_P).div_(factor_SS[column, column])
            working_SP[column + 1 : stop].addr_(factor_SS[column, column + 1 : stop], errors_P, alpha=-1)
            codes_SP[column], errors_SP[column] = codes_P, errors_P
        working_SP[stop:].addmm_(factor_SS[start:stop, stop:].T, errors_SP[start:stop], alpha=-1)
    best_O = errors_SP.square().sum(0).view(len(shrinks), num_rows).argmin(0)
    chosen_O = best_O * num_rows + torch.arange(num_rows, device=best_O.device)
    return CompensatedGroup(
        codes_SP[:, chosen_O].to(torch.uint8),
        errors_SP[:, chosen_O],
        scales_P[chosen_O],
        zero_points_P[chosen_O].to(torch.uint8),
    )
