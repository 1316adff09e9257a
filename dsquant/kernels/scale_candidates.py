"""The candidates of the searches in `scale_search`, for PyTorch and Triton."""

import math

from dsquant.kernels.values import Kind, Levels

# Candidates divide a block's range by the number of steps plus each of these.
AFFINE_FIRST, AFFINE_STEP, AFFINE_TRIES = -0.9, 0.05, 37
# from the middle outwards: where all fit alike, a range of powers of two keeps its exact scale
SYMMETRIC_STEP, SYMMETRIC_TRIES = 0.1, 19
# In a table's own units: around its lowest value, and around its highest one.
TABLE_DISTANCES = (0, -2, 2, -4, 4, -6, 6, -8, 8, 10, 12, 14)
SCALE_FIRST, SCALE_STEP, SCALE_TRIES = -20.0, 1.0, 21
LARGEST_SCALE = 63
LEAST = 1e-30
# How far a candidate must surpass one before it: rounding of the sums decides nothing.
BETTER = 1 + 1e-6


def symmetric_candidates(levels: Levels) -> list[float]:
    """Returns the levels that the weight furthest from zero is tried at, negated."""
    if levels.kind == Kind.TABLE:
        ends = (-levels.table[0], -levels.table[-1])
        return [end + math.copysign(distance, end * distance) for end in ends for distance in TABLE_DISTANCES]
    places = range(SYMMETRIC_TRIES)
    return [levels.middle + SYMMETRIC_STEP * ((number + 1) // 2) * (1 - 2 * (number % 2)) for number in places]
