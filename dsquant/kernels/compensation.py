"""Error-compensating rounding of one group: GPTQ's column loop with every candidate's parameters, each row's best kept.

GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): with U the upper Cholesky factor of the inverse Gram matrix,
rounding column j with error e changes column k > j by -e / U_jj * U_jk and costs (e / U_jj)^2 of output error.

Shape legend: S columns of the group, O rows of the weight, B blocks of the group, C candidates, P = C * O.
"""

import torch

from dsquant.kernels.grids import nearest_codes, weights_of_codes
from dsquant.kernels.values import CompensatedGroup, Levels, Parameters

# Columns that are updated one by one before the rest of the group is, by one product; a block has whole times as many.
COLUMNS_AT_ONCE = 16


def compensate_group(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, candidates: Parameters, levels: Levels
) -> CompensatedGroup:
    """Rounds a group's columns one after the other with every candidate and keeps each row's best, the first of equals.

    The columns, float32 [S, O] with S a multiple of 16, and candidates [C, O, B] are in the order of rounding. Of
    `factor_SS`, the group's part of U, nothing below the diagonal is read. A row's best has the least summed squared
    errors.
    """
    if weight_SO.is_cuda:
        from dsquant.kernels import compensation_triton

        return compensation_triton.compensate_group(weight_SO, factor_SS, candidates, levels)
    return compensate_group_reference(weight_SO, factor_SS, candidates, levels)


def compensate_group_reference(
    weight_SO: torch.Tensor, factor_SS: torch.Tensor, candidates: Parameters, levels: Levels
) -> CompensatedGroup:
    """`compensate_group` in PyTorch, on any device."""
    (size, num_rows), (num_candidates, _, num_blocks) = weight_SO.shape, candidates.scales.shape
    scales_BP, zero_points_BP = (
        part.flatten(0, 1).T.contiguous() for part in (candidates.scales, candidates.zero_points)
    )
    working_SP = weight_SO.repeat(1, num_candidates)
    codes_SP, errors_SP = torch.empty_like(working_SP), torch.empty_like(working_SP)
    for start in range(0, size, COLUMNS_AT_ONCE):
        stop, block = start + COLUMNS_AT_ONCE, start * num_blocks // size
        parameters = (scales_BP[block], zero_points_BP[block], levels)
        for column in range(start, stop):
            values_P = working_SP[column]
            codes_P = nearest_codes(values_P, *parameters)
            errors_P = (values_P - weights_of_codes(codes_P, *parameters)).div_(factor_SS[column, column])
            working_SP[column + 1 : stop].addr_(factor_SS[column, column + 1 : stop], errors_P, alpha=-1)
            codes_SP[column], errors_SP[column] = codes_P, errors_P
        working_SP[stop:].addmm_(factor_SS[start:stop, stop:].T, errors_SP[start:stop], alpha=-1)
    best_O = errors_SP.square().sum(0).view(num_candidates, num_rows).argmin(0)
    chosen_O = best_O * num_rows + torch.arange(num_rows, device=best_O.device)
    return CompensatedGroup(codes_SP[:, chosen_O].to(torch.uint8), errors_SP[:, chosen_O], best_O)
