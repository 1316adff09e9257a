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
    _invert(upper_II, inverse_II, torch.eye(BLOCK, dtype=upper_II.dtype, device=upper_II.device))
    return inverse_II


def _invert(upper_II: torch.Tensor, inverse_II: torch.Tensor, identity_BB: torch.Tensor) -> None:
    """Fills the upper triangle of the inverse."""
    size = len(upper_II)
    if size <= BLOCK:
        inverse_II.copy_(torch.linalg.solve_triangular(upper_II, identity_BB[:size, :size], upper=True))
        return
    middle = -(-size // (2 * BLOCK)) * BLOCK
    first, second = slice(0, middle), slice(middle, size)
    for part in (first, second):
        _invert(upper_II[part, part], inverse_II[part, part], identity_BB)
    product = upper_II[first, second] @ inverse_II[second, second]
    inverse_II[first, second] = (inverse_II[first, first] @ product).neg_()
