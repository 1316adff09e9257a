"""Rounds a changed weight with nothing but the recording of an earlier output (docs/decisions).

Shape legend: O out features, I in features.
"""

import torch

from dsquant.schemes import QuantizedWeight, round_to_grid, round_to_nearest

# The recorded grid serves as long as the weight's error is at most this many times the recorded one.
LARGEST_GROWTH = 1.25


def rounded_as_recorded(
    weight_OI: torch.Tensor, recorded: QuantizedWeight, recorded_error: float
) -> tuple[QuantizedWeight, bool]:
    """Rounds a changed weight, float32 [O, I] with the recorded scales applied, and returns whether its grid is new.

    The result is the nearest points of the recorded grid (scales and zero points of each group), or of a new grid over
    each group's range where the recorded one no longer fits and the new one has a smaller error. `recorded_error` is
    the old weight's distance from its rounded values, over its norm.
    """
    kept = round_to_grid(weight_OI, recorded.grid, recorded.scales_OG, recorded.zero_points_OG)
    error = float(kept.relative_error(weight_OI))
    if error <= LARGEST_GROWTH * recorded_error:
        return kept, False
    anew = round_to_nearest(weight_OI, recorded.grid)
    return (anew, True) if float(anew.relative_error(weight_OI)) < error else (kept, False)
