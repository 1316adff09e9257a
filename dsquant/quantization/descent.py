"""Coordinate descent after rounding: scales, zero points and codes change one at a time while the output error falls.

With H the (damped) Gram matrix and D = Q - W the rounding error of a row, the error is D H D^T and its half gradient
R = D H. A sweep goes through the groups, in each through its scale, its zero point and its codes (`kernels.descent`).
What a group changes is brought at once to the gradient of the groups next to it, and to those farther on in one product
for many groups; those before it wait for the next sweep, which computes R anew.

Shape legend: O out features, I in features, G groups along I, S = group size.
"""

from dataclasses import dataclass

import torch

from dsquant.kernels.descent import descend_group
from dsquant.kernels.losses import gram_losses
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.values import DescendingGroup
from dsquant.schemes import Grid, QuantizedWeight

SWEEPS = 4
# Columns whose gradient is brought up to date group by group.
NEAR = 1024


def descended_weight(weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> QuantizedWeight:
    """Lowers each row's D H D^T, four times over all scales, zero points and codes.

    Args:
        weight: a rounded weight.
        wanted_OI: what it should be, float32 [O, I].
        gram_II: H, float32 [I, I], symmetric, its diagonal positive.

    Returns:
        The weight with new codes, scales and zero points; a row that gained nothing is as it was.
    """
    state = _State(
        weight.grid,
        weight.codes_OI.T.float().contiguous(),
        weight.scales_OG.T.contiguous(),
        weight.zero_points_OG.T.float().contiguous(),
    )
    with fast_matmuls(wanted_OI.device):
        for _ in range(SWEEPS):
            _sweep(state, (state.weight().difference(wanted_OI) @ gram_II).T.contiguous(), gram_II)
    found = state.weight()
    before_O, after_O = (gram_losses(part.difference(wanted_OI), gram_II) for part in (weight, found))
    return found.or_else(weight, after_O < before_O)


@dataclass(frozen=True)
class _State:
    """A weight while it changes, a column's rows next to each other."""

    grid: Grid
    codes_IO: torch.Tensor
    scales_GO: torch.Tensor
    zero_points_GO: torch.Tensor

    def weight(self) -> QuantizedWeight:
        codes_OI, zeros_OG = (part.T.to(torch.uint8).contiguous() for part in (self.codes_IO, self.zero_points_GO))
        return QuantizedWeight(codes_OI, self.scales_GO.T.contiguous(), zeros_OG, self.grid)

    def descend(self, group: int, gradient_SO: torch.Tensor, gram_SS: torch.Tensor) -> torch.Tensor:
        """Moves one group; what its weights changed by."""
        size = self.grid.group_size
        codes_SO = self.codes_IO[group * size : (group + 1) * size]
        moving = DescendingGroup(codes_SO, self.scales_GO[group], self.zero_points_GO[group])
        return descend_group(moving, gradient_SO, gram_SS, self.grid.maximum_code, self.grid.symmetric)


def _sweep(state: _State, gradient_IO: torch.Tensor, gram_II: torch.Tensor) -> None:
    """Once through all groups; the gradient is brought up to date ahead of them only."""
    size, width = state.grid.group_size, len(gradient_IO)
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
