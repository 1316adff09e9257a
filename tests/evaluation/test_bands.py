"""A mean KL divergence is put into words by the worst of the texts."""

import math

import pytest

from dsquant.evaluation.bands import in_words, verdict


@pytest.mark.parametrize(
    ("mean_kl", "words"),
    [
        (0.0, "as far as can be measured"),
        (0.0049, "6-bit weights usually are"),
        (0.0075, "nearer to the original than 4-bit"),
        (0.02, "as near to the original as 4-bit"),
        (0.07, "further from the original than 4-bit"),
        (0.1, "visibly differ"),
        (math.inf, "visibly differ"),
        (math.nan, "visibly differ"),
    ],
)
def test_each_band_has_its_words(mean_kl: float, words: str) -> None:
    assert words in in_words(mean_kl)


def test_a_candidate_is_judged_by_its_worst_text_and_by_one_that_cannot_be_scored() -> None:
    assert verdict("awq", {"code": 0.004, "wiki": 0.02}) == (
        "awq is as near to the original as 4-bit weights usually are (mean KL 0.0200 on wiki)."
    )
    assert "on code" in verdict("awq", {"code": math.nan, "wiki": 0.2})
