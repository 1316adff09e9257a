"""Matrix products in blocks that a job's threads share; a product that is one block is PyTorch's own.

Shape legend: R rows, I inner dimension, O columns of the product.
"""

import torch
import torch.nn.functional as F

from dsquant.kernels.threads import blocks_of, side_by_side

# Where blocks of columns are rounded one after the other, so many columns get a block's change at once, and those
# farther on the changes of as many columns in one product: they pass through memory once for all.
NEAR = 1024


def apply_linear(inputs: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies inputs [..., I] with a weight [O, I] as `torch.nn.functional.linear` does: [..., O]."""
    (num_columns, width), num_rows = weight_OI.shape, inputs.shape[:-1].numel()
    by_rows = num_rows >= num_columns
    blocks = blocks_of(max(num_rows, num_columns), min(num_rows, num_columns) * width)
    differentiated = torch.is_grad_enabled() and inputs.requires_grad  # blocks written in place by threads are not
    if inputs.is_cuda or len(blocks) == 1 or differentiated:
        return F.linear(inputs, weight_OI, bias_O)
    inputs_RI, product_RO = inputs.reshape(-1, width), inputs.new_empty(num_rows, num_columns)

    def fill(block: slice) -> None:
        if by_rows:
            product_RO[block] = F.linear(inputs_RI[block], weight_OI, bias_O)
        else:
            product_RO[:, block] = F.linear(inputs_RI, weight_OI[block], None if bias_O is None else bias_O[block])

    side_by_side(fill, blocks)
    return product_RO.unflatten(0, inputs.shape[:-1])


def add_product(total_RO: torch.Tensor, left_RI: torch.Tensor, right_IO: torch.Tensor) -> None:
    """Adds a product to a matrix in place."""
    if total_RO.is_cuda:
        total_RO.addmm_(left_RI, right_IO)
        return
    blocks = blocks_of(len(total_RO), right_IO.numel())
    side_by_side(lambda block: total_RO[block].addmm_(left_RI[block], right_IO), blocks)
