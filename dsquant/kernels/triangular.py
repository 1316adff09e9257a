"""Inverses of triangular matrices, mostly by matrix products, which GPUs are best at.

Shape legend: I rows and columns, B rows and columns of a block.
"""

import torch

BLOCK = 256


def upper_inverse(upper_II: torch.Tensor) -> torch.Tensor:
    """Inverts an upper triangular matrix, float64 [I, I]; nothing below its diagonal is read.

    The inverse of [[A, B], [0, C]] is [[A^-1, -A^-1 B C^-1], [0, C^-1]], applied to halves down to `BLOCK`: a third of
    the operations of solving for the whole identity.
    """
    inverse_II = torch.zeros_like(upper_II)
    identity_BB = torch.eye(BLOCK, dtype=upper_II.dtype, device=upper_II.device)

    def invert(start: int, stop: int) -> None:
        size, own = stop - start, slice(start, stop)
        if size <= BLOCK:
            inverse_II[own, own] = torch.linalg.solve_triangular(
                upper_II[own, own], identity_BB[:size, :size], upper=True
            )
            return
        middle = start + -(-size // (2 * BLOCK)) * BLOCK
        invert(start, middle)
        invert(middle, stop)
        first, second = slice(start, middle), slice(middle, stop)
        inverse_II[first, second] = -(inverse_II[first, first] @ (upper_II[first, second] @ inverse_II[second, second]))

    invert(0, len(upper_II))
    return inverse_II
