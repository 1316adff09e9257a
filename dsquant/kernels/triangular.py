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
    inverse_II, whole = torch.zeros_like(upper_II), len(upper_II) // BLOCK * BLOCK
    blocks_BBG = _blocks(inverse_II, whole)
    blocks_BBG.copy_(_solved(_blocks(upper_II, whole).permute(2, 0, 1)).permute(1, 2, 0))
    inverse_II[whole:, whole:] = _solved(upper_II[whole:, whole:])
    _fill(upper_II, inverse_II)
    return inverse_II


def _blocks(matrix_II: torch.Tensor, size: int) -> torch.Tensor:
    """The diagonal blocks of the first rows and columns, a view [B, B, G]."""
    return matrix_II[:size, :size].unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).diagonal(dim1=0, dim2=2)


def _solved(upper: torch.Tensor) -> torch.Tensor:
    """The inverses of small matrices [..., B, B]."""
    return torch.linalg.solve_triangular(
        upper, torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device), upper=True
    )


def _fill(upper_II: torch.Tensor, inverse_II: torch.Tensor) -> None:
    """Fills what is above the diagonal blocks."""
    size = len(upper_II)
    if size <= BLOCK:
        return
    middle = -(-size // (2 * BLOCK)) * BLOCK
    first, second = slice(0, middle), slice(middle, size)
    for part in (first, second):
        _fill(upper_II[part, part], inverse_II[part, part])
    product = upper_II[first, second] @ inverse_II[second, second]
    inverse_II[first, second] = (inverse_II[first, first] @ product).neg_()
