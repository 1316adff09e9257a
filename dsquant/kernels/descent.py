"""Coordinate descent on the codes of one group: each column to its best code, given all others as they are by then.

With R the half gradient of a row's error and H the Gram matrix, column j's best code is the nearest grid point to
q_j - R_j / (H_jj s); a change d of the weight changes R by d H_j (QuantEase, arXiv 2309.01885, algorithm 1).

Shape legend: S columns of the group, O rows of the weight.
"""

import torch


def descend_codes(
    codes_SO: torch.Tensor, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, scales_O: torch.Tensor, maximum_code: int
) -> torch.Tensor:
    """Moves a group's codes to their best values, one column after the other.

    Args:
        codes_SO: float32 [S, O], whole numbers in [0, maximum_code], S = 32, 64 or 128; overwritten with the new ones.
        gradient_SO: float32 [S, O], R before; not changed.
        gram_SS: float32 [S, S], the group's block of H, its diagonal positive.
        scales_O: float32 [O].
        maximum_code: the largest code.

    Returns:
        What each weight changed by, float32 [S, O].
    """
    if codes_SO.is_cuda:
        from dsquant.kernels import descent_triton

        return descent_triton.descend_codes(codes_SO, gradient_SO, gram_SS, scales_O, maximum_code)
    return descend_codes_reference(codes_SO, gradient_SO, gram_SS, scales_O, maximum_code)


def descend_codes_reference(
    codes_SO: torch.Tensor, gradient_SO: torch.Tensor, gram_SS: torch.Tensor, scales_O: torch.Tensor, maximum_code: int
) -> torch.Tensor:
    """`descend_codes` in PyTorch, on any device.

    Args:
        codes_SO: as for `descend_codes`.
        gradient_SO: as for `descend_codes`.
        gram_SS: as for `descend_codes`.
        scales_O: as for `descend_codes`.
        maximum_code: as for `descend_codes`.

    Returns:
        As `descend_codes`.
    """
    before_SO, gradient_SO = codes_SO.clone(), gradient_SO.clone()
    steps_S = gram_SS.diagonal().reciprocal()
    for column in range(len(codes_SO)):
        wanted_O = codes_SO[column] - gradient_SO[column] * steps_S[column] / scales_O
        new_O = wanted_O.round_().clamp_(0, maximum_code)
        gradient_SO[column:].addr_(gram_SS[column, column:], (new_O - codes_SO[column]).mul_(scales_O))
        codes_SO[column] = new_O
    return (codes_SO - before_SO).mul_(scales_O)
