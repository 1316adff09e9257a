"""What a mean KL divergence means, in words.

The bands are those of mlx-kld, an evaluator of quantized models: below 0.005 nats is usual with 6 bits, 0.01 to 0.05
with 4 bits, and above 0.1 differences can be seen in what a model writes.
"""

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsquant.evaluation.results import Evaluation

BANDS = (
    (1e-6, "the original, as far as can be measured"),
    (0.005, "as near to the original as 6-bit weights usually are"),
    (0.01, "nearer to the original than 4-bit weights usually are"),
    (0.05, "as near to the original as 4-bit weights usually are"),
    (0.1, "further from the original than 4-bit weights usually are"),
)
LONG = 1e5
BEYOND = "so far from the original that answers will visibly differ"


def in_words(mean_kl: float) -> str:
    """Returns what a mean KL divergence in nats means, as the end of a sentence."""
    return next((words for most, words in BANDS if mean_kl < most), BEYOND)


def written(perplexity: float) -> str:
    """Returns a perplexity with three decimals, or three digits where a model is lost and the number is long."""
    return f"{perplexity:.3f}" if perplexity < LONG else f"{perplexity:.2e}"


def verdict(name: str, mean_kls: dict[str, float]) -> str:
    """Returns a sentence about a candidate with the mean KL divergence of each text, judged by the largest."""
    text = max(mean_kls, key=lambda one: (mean_kls[one] != mean_kls[one], mean_kls[one]))
    words = in_words(mean_kls[text])
    nearer = " More bits or more samples of calibration bring it nearer." if words == BEYOND else ""
    return f"{name} is {words} (mean KL {mean_kls[text]:.4f} on {text}).{nearer}"


def verdicts(evaluation: "Evaluation") -> list[str]:
    """Returns a sentence about each candidate: how near it is to the original, and what plain rounding would cost."""
    plain = {one.plain_of: one.mean_kl for one in evaluation.candidates if one.plain_of and one.texts}
    sentences = []
    for one in evaluation.given:
        if one.texts:
            sentences.append(verdict(one.name, one.mean_kls))
            if any(text.mean_kl.high == inf for text in one.texts.values()):
                sentences[-1] = f"{one.name}: the texts are too short for a verdict; take more --samples."
            elif one.name in plain:
                ours, theirs = one.mean_kl, plain[one.name]
                sentences[-1] += (
                    f" Over all texts {ours:.4f}; plain rounding to the same grids would cost {theirs:.4f}."
                )
    return sentences
