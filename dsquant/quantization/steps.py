"""Rounds a weight as the steps of a recipe say.

Shape legend: O out features, I in features.
"""

from collections.abc import Collection, Iterable, Sequence

import torch

from dsquant.kernels.threads import side_by_side
from dsquant.presets import Step
from dsquant.quantization.clip import FULL_RANGE, PARTS_AT_ONCE, clipped_weight, rows_of_part
from dsquant.quantization.compensate import compensated_weight, regularized, with_inverses
from dsquant.quantization.descend import descended_weight
from dsquant.quantization.statistics import InputMoments
from dsquant.schemes import QuantizedWeight, Scheme, round_to_nearest, stacked, widest_vectors


def prepared(moments: InputMoments, schemes: Iterable[Scheme], steps: Collection[Step]) -> InputMoments:
    """Returns moments with what `rounded_weight` would otherwise compute for each weight that reads these inputs.

    The schemes of these weights have the same `units`, those that are rounded.
    """
    scheme = widest_vectors(schemes)
    return moments if scheme is None or "compensate" not in steps else with_inverses(moments, scheme)


def rounded_weight(
    weight_OI: torch.Tensor, grid: Scheme, moments: InputMoments, steps: Collection[Step]
) -> QuantizedWeight:
    """Rounds a weight [O, I] with `clip`, `compensate` and `descend`, those of them that are steps; plainly with none.

    Only plainly too where it is not rounded to the scheme in the end, but by its format.
    Where the moments hold no token, or too little for it, nothing is compensated (`compensated_weight`); nothing
    descends where they hold no whole Gram matrix, or one code stands for several weights.
    """
    if not grid.rounded:
        return round_to_nearest(weight_OI, grid)
    ratios = None if "clip" in steps else FULL_RANGE
    rounded = (compensated_weight if "compensate" in steps else clipped_weight)(weight_OI, grid, moments, ratios)
    if "descend" not in steps or not grid.single or moments.gram_II is None or not moments.count:
        return rounded
    gram_II = regularized(moments.gram_II, moments.count)
    num_rows = rows_of_part(weight_OI)
    parts = zip(rounded.split(num_rows), weight_OI.split(num_rows), strict=True)
    return stacked(side_by_side(lambda part: descended_weight(*part, gram_II), parts, PARTS_AT_ONCE))


def rounded_weights(
    weights: Sequence[torch.Tensor], grids: Sequence[Scheme], moments: InputMoments, steps: Collection[Step]
) -> list[QuantizedWeight]:
    """Rounds weights that read one input, each [O, I] with its own O, as `rounded_weight` does; those on one grid
    together, since what rounding takes grows more slowly than rows."""
    found: dict[int, QuantizedWeight] = {}
    for grid in dict.fromkeys(grids):
        places = [place for place, own in enumerate(grids) if own == grid]
        together_OI = torch.cat([weights[place] for place in places]) if places[1:] else weights[places[0]]
        parts = rounded_weight(together_OI, grid, moments, steps).split([len(weights[place]) for place in places])
        found.update(zip(places, parts, strict=True))
    return [found[place] for place in range(len(weights))]
