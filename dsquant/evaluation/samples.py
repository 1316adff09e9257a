"""The texts of an evaluation as samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.texts import HELD_OUT_TEXTS, text_tokens, tokens_sha256
from dsquant.errors import UsageError
from dsquant.evaluation.request import EvaluationRequest
from dsquant.evaluation.results import Text


@dataclass(frozen=True)
class Texts:
    """The samples of all texts, one after another."""

    tokens_NT: torch.Tensor
    samples: Mapping[str, slice]
    described: tuple[Text, ...]


def read_texts(request: EvaluationRequest, tokenizer: Any) -> Texts:
    """Tokenizes the texts of an evaluation into samples, with the reference's tokenizer. Raises InputError where a text
    is missing or too short for one sample, UsageError where a text is given twice."""
    chosen = request.texts or HELD_OUT_TEXTS
    if len(set(chosen)) < len(chosen):
        raise UsageError("name each --text once")
    short = Counter(Path(text).name for text in chosen)
    parts, samples, described, start = [], {}, [], 0
    for text in chosen:
        name = Path(text).name if short[Path(text).name] == 1 else text
        tokens_NT = text_tokens(text, tokenizer, request.seq_len, request.samples)
        parts.append(tokens_NT)
        samples[name] = slice(start, start + len(tokens_NT))
        described.append(Text(name, len(tokens_NT), request.seq_len, tokens_sha256(tokens_NT)))
        start += len(tokens_NT)
    return Texts(torch.cat(parts), samples, tuple(described))
