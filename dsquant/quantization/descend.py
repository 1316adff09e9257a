"""Coordinate descent after rounding: scales, zero points and codes change one at a time while the output error falls.

With H the (damped) Gram matrix and D = Q - W the rounding error of a row, the error is D H D^T and its half gradient R
= D H. A sweep goes through the blocks that share a scale, in each through its scale, its zero point and its codes
(`kernels.descent`). The changes of a block are added at once to the gradient of the blocks next to it, and to those
farther on in one product for many blocks; those before it wait for the next sweep, which computes R again.

Shape legend: O out features, I in features, B blocks along I, S = block size.
"""

from dataclasses import dataclass

import torch

from dsquant.kernels.descent import descend_block
from dsquant.kernels.grids import codes_of_values, values_of_codes
from dsquant.kernels.losses import gram_losses
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import NEAR
from dsquant.kernels.values import DescendingBlock, Kind, Parameters
from dsquant.schemes import QuantizedWeight, Scheme, quantized

SWEEPS = 4


def descended_weight(weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> QuantizedWeight:
    """Lowers each row's D H D^T by `SWEEPS` sweeps over all scales, zero points and codes.

    `wanted_OI` is the weight before rounding; `gram_II` is H, float32 and symmetric with a positive diagonal. A row
    that gains nothing stays unchanged.
    """
    state = _State.of(weight)
    with fast_matmuls(wanted_OI.device):
        for _ in range(SWEEPS):
            _sweep(state, (state.weight().difference(wanted_OI) @ gram_II).T.contiguous(), gram_II)
    found = state.weight()
    before_O, after_O = (gram_losses(part.difference(wanted_OI), gram_II) for part in (weight, found))
    return found.or_else(weight, after_O < before_O)


@dataclass(frozen=True)
class _State:
    """A weight while it changes, a column's rows next to each other."""

    scheme: Scheme
    fixed: Parameters
    """Of the weight before: source of what does not move."""
    levels_IO: torch.Tensor
    scales_BO: torch.Tensor
    zero_points_BO: torch.Tensor

    @staticmethod
    def of(weight: QuantizedWeight) -> "_State":
        levels, zeros_OB = weight.grid.levels, weight.zero_points_OG.float()
        if levels.kind != Kind.INTEGERS:  # offsets do not move, so changes need not know of them
            zeros_OB = torch.zeros_like(zeros_OB)
        parts = (values_of_codes(weight.codes_OI, levels), weight.scales_OG, zeros_OB)
        return _State(weight.grid, weight.parameters, *(part.T.contiguous() for part in parts))

    def weight(self) -> QuantizedWeight:
        codes_OI = codes_of_values(self.levels_IO.T, self.scheme.levels).contiguous()
        if not self.scheme.levels.movable:
            return quantized(codes_OI, self.fixed, self.scheme)
        moved = Parameters(self.scales_BO.T.contiguous(), self.zero_points_BO.T.contiguous())
        return quantized(codes_OI, moved, self.scheme)

    def descend(self, block: int, gradient_SO: torch.Tensor, gram_SS: torch.Tensor) -> torch.Tensor:
        """Moves one block; returns the change of its weights."""
        size = self.scheme.block_size
        levels_SO = self.levels_IO[block * size : (block + 1) * size]
        moving = DescendingBlock(levels_SO, self.scales_BO[block], self.zero_points_BO[block])
        return descend_block(moving, gradient_SO, gram_SS, self.scheme.levels)


def _sweep(state: _State, gradient_IO: torch.Tensor, gram_II: torch.Tensor) -> None:
    """Once through all blocks; the gradient is brought up to date ahead of them only."""
    size, width = state.scheme.block_size, len(gradient_IO)
    for near in range(0, width, NEAR):
        far = min(near + NEAR, width)
        changes = []
        for start in range(near, far, size):
            stop = start + size
            changes.append(
                state.descend(start // size, gradient_IO[start:stop], gram_II[start:stop, start:stop].contiguous())
            )
            gradient_IO[stop:far].addmm_(gram_II[stop:far, start:stop], changes[-1])
        gradient_IO[far:].addmm_(gram_II[far:, near:far], torch.cat(changes))
