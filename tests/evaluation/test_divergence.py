"""Streamed perplexity, KL divergence and agreement equal a direct calculation with transformers' whole model."""

from pathlib import Path

import pytest
import torch
from checkpoints import full_model
from streams import plainly_rounded

from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.summary import text_scores
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model import streaming
from dsquant.model.skeleton import Skeleton


@pytest.mark.parametrize("vocabulary_at_once", [8192, 500], ids=["whole vocabulary", "vocabulary in parts"])
def test_streamed_scores_equal_the_whole_models(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary_at_once: int
) -> None:
    monkeypatch.setattr(streaming, "VOCABULARY_AT_ONCE", vocabulary_at_once)
    checkpoint = open_checkpoint(tiny_r1)
    tokens = held_out_tokens("code", load_tokenizer(tiny_r1), 128, 3)
    candidate = plainly_rounded(checkpoint.weights)
    scores = compare(ComparedModels(Skeleton(checkpoint), checkpoint.weights, {"c": candidate}, 2), tokens, tmp_path)[
        "c"
    ]
    with torch.no_grad():
        wanted, found = (
            full_model(tiny_r1, weights)(tokens).logits.double().log_softmax(-1)[:, :-1]
            for weights in (checkpoint.weights, candidate)
        )
    targets = tokens[:, 1:].unsqueeze(-1)
    summary = text_scores(scores)
    exactly = {
        summary.mean_kl.estimate: (wanted.exp() * (wanted - found)).sum(-1).mean(),
        summary.kl.p99: (wanted.exp() * (wanted - found)).sum(-1).quantile(0.99),
        summary.mean_kl_reverse.estimate: (found.exp() * (found - wanted)).sum(-1).mean(),
        summary.perplexity: (-found.gather(-1, targets).mean()).exp(),
        summary.perplexity_original: (-wanted.gather(-1, targets).mean()).exp(),
        summary.log_ratio.estimate: (wanted - found).gather(-1, targets).mean(),
        summary.delta_p_rms: (found.exp() - wanted.exp()).gather(-1, targets).square().mean().sqrt(),
    }
    for ours, theirs in exactly.items():
        assert ours == pytest.approx(float(theirs), rel=1e-4)
    agreement = (wanted.argmax(-1) == found.argmax(-1)).double().mean()
    assert summary.top1_agreement.estimate == pytest.approx(float(agreement), abs=3e-3)
    fives = [one.topk(5).indices.flatten(0, 1).tolist() for one in (wanted, found)]
    shares = [len({*ours} & {*theirs}) / 5 for ours, theirs in zip(*fives, strict=True)]
    assert summary.top5_agreement.estimate == pytest.approx(sum(shares) / len(shares), abs=3e-3)
    assert summary.tokens == 3 * 127 and summary.mean_kl.estimate > 0.01
    assert scores.summary().mean_kl == pytest.approx(summary.mean_kl.estimate)
    assert not list(tmp_path.iterdir())


def test_a_model_is_at_no_distance_from_itself(tiny_r1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    tokens = held_out_tokens("wiki", load_tokenizer(tiny_r1), 64, 2)
    models = ComparedModels(Skeleton(checkpoint), checkpoint.weights, {"c": checkpoint.weights}, 2)
    scores = compare(models, tokens, tmp_path)["c"]
    assert scores.summary().mean_kl < 1e-9 and scores.summary().top1_agreement == 1
