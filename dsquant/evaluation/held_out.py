"""Compares a job's outputs with its source on the shipped held-out texts: the table at the end of a job."""

from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.texts import HELD_OUT_TEXTS, held_out_tokens
from dsquant.evaluation.divergence import ComparedModels, SafePoint, compare
from dsquant.evaluation.needs import needs, stays_on_gpu

EVALUATION_SAMPLES = 8
EVALUATION_SEQ_LEN = 512


def compare_on_texts(
    models: ComparedModels, tokenizer: Any, seq_len: int, work: Path, safe_point: SafePoint
) -> dict[str, dict[str, Any]]:
    """Compares models on the shipped held-out texts, in samples of at most `seq_len` tokens.

    Returns candidate -> text -> the fields of a `Divergence`.
    """
    seq_len = min(EVALUATION_SEQ_LEN, seq_len)
    tokens = {text: held_out_tokens(text, tokenizer, seq_len, EVALUATION_SAMPLES) for text in HELD_OUT_TEXTS}
    together_NT = torch.cat(list(tokens.values()))
    need = needs(models, *together_NT.shape)
    on_gpu = stays_on_gpu(models.original.device, need.memory + need.disk)
    scores = compare(models, together_NT, None if on_gpu else work, safe_point)
    found: dict[str, dict[str, Any]] = {name: {} for name in models.candidates}
    start = 0
    for text, tokens_NT in tokens.items():
        for name, token_scores in scores.items():
            found[name][text] = vars(token_scores.of_samples(start, start + len(tokens_NT)).summary())
        start += len(tokens_NT)
    return found
