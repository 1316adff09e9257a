"""Coordinate descent after rounding: scales, zero points and codes change one at a time while the output error falls.

With H the (damped) Gram matrix and D = Q - W the rounding error of a row, the error is D H D^T and its half gradient
R = D H. Codes are `kernels.descent`'s. A group's scale s with codes less zero point u is best at
s - (u R_g) / (u H_gg u^T), the weighted least squares of that one number.

Shape legend: O out features, I in features, G groups along I, S = group size.
"""

import torch

from dsquant.kernels.descent import descend_codes
from dsquant.kernels.grids import storable_scales
from dsquant.kernels.losses import gram_losses
from dsquant.rounding import Grid, QuantizedWeight

SWEEPS = 4


def descended_weight(weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> QuantizedWeight:
    """Lowers each row's D H D^T, four times over all scales, zero points and codes.

    Args:
        weight: a rounded weight.
        wanted_OI: what it should be, float32 [O, I].
        gram_II: H, float32 [I, I], symmetric, its diagonal positive.

    Returns:
        The weight with new codes, scales and zero points; a row that gained nothing is as it was.
    """
    state = _State(weight, wanted_OI, gram_II)
    for _ in range(SWEEPS):
        state.restart()
        for group in range(weight.scales_OG.shape[1]):
            state.fit_scale(group)
            if not weight.grid.symmetric:
                state.fit_zero_point(group)
        for group in range(weight.scales_OG.shape[1]):
            state.fit_codes(group)
    found = state.result()
    before_O, after_O = (gram_losses(part.difference(wanted_OI), gram_II) for part in (weight, found))
    keep_O1 = (after_O < before_O).unsqueeze(1)
    return QuantizedWeight(
        torch.where(keep_O1, found.codes_OI, weight.codes_OI),
        torch.where(keep_O1, found.scales_OG, weight.scales_OG),
        torch.where(keep_O1, found.zero_points_OG, weight.zero_points_OG),
        weight.grid,
    )


class _State:
    """The weight in float32, with R kept up to date."""

    def __init__(self, weight: QuantizedWeight, wanted_OI: torch.Tensor, gram_II: torch.Tensor) -> None:
        self._grid: Grid = weight.grid
        self._wanted_OI, self._gram_II = wanted_OI, gram_II
        self._codes_OI = weight.codes_OI.float()
        self._scales_OG = weight.scales_OG.clone()
        self._zeros_OG = weight.zero_points_OG.float()
        self._gradient_OI = torch.empty_like(wanted_OI)

    def _columns(self, group: int) -> slice:
        return slice(group * self._grid.group_size, (group + 1) * self._grid.group_size)

    def result(self) -> QuantizedWeight:
        codes_OI, zeros_OG = self._codes_OI.to(torch.uint8), self._zeros_OG.to(torch.uint8)
        return QuantizedWeight(codes_OI, self._scales_OG, zeros_OG, self._grid)

    def restart(self) -> None:
        """Computes R anew, so that rounding errors of its updates do not add up."""
        torch.mm(self.result().difference(self._wanted_OI), self._gram_II, out=self._gradient_OI)

    def fit_scale(self, group: int) -> None:
        """Moves a group's scales to their best storable values."""
        columns = self._columns(group)
        centred_OS = self._codes_OI[:, columns] - self._zeros_OG[:, group : group + 1]
        spread_OI = centred_OS @ self._gram_II[columns]
        curvature_O = (spread_OI[:, columns] * centred_OS).sum(1)
        slope_O = (centred_OS * self._gradient_OI[:, columns]).sum(1)
        scales_O = self._scales_OG[:, group]
        wanted_O = scales_O - slope_O / torch.where(curvature_O > 0, curvature_O, 1.0)
        change_O = storable_scales(wanted_O) - scales_O
        falls_O = (curvature_O > 0) & (2 * change_O * slope_O + change_O.square() * curvature_O < 0)
        change_O = torch.where(falls_O, change_O, 0.0)
        scales_O += change_O
        self._gradient_OI.addcmul_(change_O.unsqueeze(1), spread_OI)

    def fit_zero_point(self, group: int) -> None:
        """Moves a group's zero points by one, up or down, where that helps: all its weights move by the scale."""
        columns, scales_O, zeros_O = self._columns(group), self._scales_OG[:, group], self._zeros_OG[:, group]
        spread_I = self._gram_II[columns].sum(0)
        curvature = spread_I[columns].sum()
        for step in (1.0, -1.0):
            change_O = -step * scales_O
            gain_O = 2 * change_O * self._gradient_OI[:, columns].sum(1) + change_O.square() * curvature
            falls_O = (gain_O < 0) & (zeros_O + step >= 0) & (zeros_O + step <= self._grid.maximum_code)
            zeros_O += torch.where(falls_O, step, 0.0)
            self._gradient_OI.addr_(torch.where(falls_O, change_O, 0.0), spread_I)

    def fit_codes(self, group: int) -> None:
        """Moves a group's codes to their best values, one column after the other."""
        columns = self._columns(group)
        codes_SO, gradient_SO = (part[:, columns].T.contiguous() for part in (self._codes_OI, self._gradient_OI))
        gram_SS, scales_O = self._gram_II[columns, columns].contiguous(), self._scales_OG[:, group].contiguous()
        changes_SO = descend_codes(codes_SO, gradient_SO, gram_SS, scales_O, self._grid.maximum_code)
        self._codes_OI[:, columns] = codes_SO.T
        self._gradient_OI.addmm_(changes_SO.T, self._gram_II[columns])
