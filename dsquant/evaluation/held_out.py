"""Compares a job's outputs with its source, on the shipped held-out texts: the table at a job's end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.texts import HELD_OUT_TEXTS, held_out_tokens
from dsquant.evaluation.divergence import compare
from dsquant.model.skeleton import Skeleton
from dsquant.reporting.progress import Stage
from dsquant.source.weights import Weights

EVALUATION_SAMPLES = 8
EVALUATION_SEQ_LEN = 512


@dataclass(frozen=True)
class Comparison:
    """The models that an evaluation at the end of a job compares."""

    skeleton: Skeleton
    original: Weights
    candidates: dict[str, Weights]
    work: Path
    batch_samples: int
    safe_point: Callable[[Stage, int, int, str], None]


def compare_on_texts(models: Comparison, tokenizer: Any, seq_len: int) -> dict[str, dict[str, Any]]:
    """Compares models on the shipped held-out texts: losses and divergences only.

    Args:
        models: the models.
        tokenizer: the original's.
        seq_len: tokens of a sample, at the most.

    Returns:
        Candidate -> text -> the fields of a `Divergence`.
    """
    seq_len = min(EVALUATION_SEQ_LEN, seq_len)
    tokens = {text: held_out_tokens(text, tokenizer, seq_len, EVALUATION_SAMPLES) for text in HELD_OUT_TEXTS}
    scores = compare(
        models.skeleton,
        models.original,
        models.candidates,
        torch.cat(list(tokens.values())),
        models.work,
        models.batch_samples,
        lambda done, total, what: models.safe_point("evaluate", done, total, what),
    )
    found: dict[str, dict[str, Any]] = {name: {} for name in models.candidates}
    start = 0
    for text, tokens_NT in tokens.items():
        for name, token_scores in scores.items():
            found[name][text] = vars(token_scores.of_samples(start, start + len(tokens_NT)).summary())
        start += len(tokens_NT)
    return found
