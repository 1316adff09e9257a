"""Confidence intervals of means over tokens that depend on each other: the block bootstrap; and of paired shares.

Neighbouring tokens share their context, so their losses are correlated and the usual standard error is too small.
Resampling whole blocks of neighbours keeps the correlation inside them (Künsch 1989; Carlstein 1986 for blocks that do
not overlap, as here).

Shape legend: N samples, T tokens of a sample, B blocks, D draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

# Tokens of a block: longer than the correlation of losses in text, short enough that a sample of 512 gives eight.
BLOCK_TOKENS = 64
DRAWS = 2000
CONFIDENCE = 0.95
LARGEST_LOGIT = 100.0


@dataclass(frozen=True)
class Interval:
    """An estimate and the range of the true value at the stated confidence."""

    estimate: float
    low: float
    high: float
    units: int
    """Independent units that it rests on: blocks of tokens, prompts, or documents."""

    def transformed(self, function: Callable[[float], float]) -> "Interval":
        """Returns the interval of an increasing function of the estimated number, such as exp."""
        return Interval(function(self.estimate), function(self.low), function(self.high), self.units)


def bootstrap_mean(
    values_NT: np.ndarray,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    block_tokens: int = BLOCK_TOKENS,
    kind: Literal["any", "signed", "share"] = "any",
) -> Interval:
    """Returns the mean of values of tokens [N, T] with an interval from the block bootstrap (percentiles of 2000
    draws), as wide as Student's for few blocks.

    The interval is the whole line where there is only one block. `signed` values could be negative where none is; a
    `share` is from 0 to 1.
    """
    sums_B, counts_B = _blocks(np.asarray(values_NT, dtype=np.float64), block_tokens)
    estimate, blocks = float(sums_B.sum() / counts_B.sum()), len(sums_B)
    if blocks < 2:
        return Interval(estimate, -np.inf, np.inf, blocks)
    draw = np.random.default_rng(seed)
    chosen_DB = draw.integers(blocks, size=(DRAWS, blocks))
    means_D = sums_B[chosen_DB].sum(1) / counts_B[chosen_DB].sum(1)
    # The spread of resampled means is that of a variance divided by B, the sample's divides by B - 1; and of few blocks
    # it is itself uncertain, which makes a normal distribution Student's.
    stretch_D = np.sqrt(blocks / draw.chisquare(blocks - 1, DRAWS))
    means_D = estimate + (means_D - estimate) * stretch_D
    low, high = np.quantile(means_D, [(1 - confidence) / 2, (1 + confidence) / 2])
    if kind == "share" and 0 < estimate < 1:  # both distances are those of the logits
        logits = np.log(estimate / (1 - estimate)) + (np.array([low, high]) - estimate) / (estimate * (1 - estimate))
        low, high = 1 / (1 + np.exp(-logits.clip(-LARGEST_LOGIT, LARGEST_LOGIT)))
    elif kind != "signed" and np.min(values_NT) >= 0 < estimate:  # below what cannot be negative, of the logarithms
        low = estimate * np.exp(low / estimate - 1)
    return Interval(estimate, float(low), float(high), blocks)


def paired_shares(differences_N: np.ndarray, confidence: float = CONFIDENCE, largest: float = 1.0) -> Interval:
    """Returns the mean of differences between scores from 0 to 1 of the same documents, with Bonett's and Price's
    interval (J. Educ. Behav. Stat. 37, 2012).

    It adds a document on which one side wins by `largest` and one on which the other does: that a few documents came
    out the same does not show that none would differ.
    """
    estimate, count = float(differences_N.mean()), len(differences_N) + 2
    centre = float(differences_N.sum()) / count
    variance = (float((differences_N**2).sum()) + 2 * largest**2) / count - centre**2
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.sqrt(variance / count))
    return Interval(estimate, min(centre - reach, estimate), max(centre + reach, estimate), len(differences_N))


def _blocks(values_NT: np.ndarray, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sum and count of every block; a short last block of a sample counts with its length."""
    starts = np.arange(0, values_NT.shape[1], block_tokens)
    sums_NB = np.add.reduceat(values_NT, starts, axis=1)
    counts_B = np.diff(np.append(starts, values_NT.shape[1]))
    return sums_NB.ravel(), np.tile(counts_B, len(values_NT))


def units_to_settle(found: Interval, limit: float) -> int | None:
    """Returns how many units would bring the nearer end of an interval to a gate's limit, if the estimate stayed the
    same.

    An interval's width falls with the square root of its units. Returns at least two; None where the estimate is so
    close to the limit that no number would do.
    """
    distance = abs(found.estimate - limit)
    width = found.high - found.estimate if limit > found.estimate else found.estimate - found.low
    if distance == 0 or not np.isfinite(width):
        return None
    return max(2, int(np.ceil(found.units * (width / distance) ** 2)))
