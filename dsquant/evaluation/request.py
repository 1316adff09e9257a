"""The request of `dsquant eval`: models, texts, limits; and the texts as samples."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsquant.calibration.texts import HELD_OUT_TEXTS, text_tokens, tokens_sha256
from dsquant.errors import UsageError
from dsquant.evaluation.code.drift_plan import DriftRequest
from dsquant.evaluation.results import Text


@dataclass(frozen=True)
class EvaluationRequest:
    """Models, texts and limits of an evaluation."""

    reference: str
    """A folder, a hub id, `tiny-r1`, or a GGUF file."""
    candidates: tuple[str, ...]
    """Of the same model, in the same forms."""
    texts: tuple[str, ...] = ()
    """Shipped texts or files; every shipped one where empty."""
    samples: int = 8
    """Largest number of samples of each text."""
    seq_len: int = 512
    seed: int = 0
    """Seed of the bootstrap's draws."""
    gates: Path | None = None
    drift: DriftRequest = field(default_factory=DriftRequest)
    """Whether and how code is generated."""
    output: Path | None = None
    """Folder for report.json, report.md and report.html."""
    device: str = "auto"
    """auto, cpu or cuda."""
    memory_budget: int | None = None
    """Bytes; None is 80 % of what is available, at most 16 GiB."""


@dataclass(frozen=True)
class Texts:
    """The samples of all texts, one after another."""

    tokens_NT: torch.Tensor
    samples: Mapping[str, slice]
    described: tuple[Text, ...]


def candidate_names(paths: tuple[str, ...]) -> dict[str, str]:
    """Returns name -> path, with as much of the end of each path as no other candidate shares as its name.

    Raises UsageError where a candidate is given twice.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise UsageError(f"candidate {twice!r} is named twice")
    ends = {path: _ends(path) for path in paths}
    counts = Counter(end for found in ends.values() for end in dict.fromkeys(found))
    return {next((end for end in found if counts[end] == 1), path): path for path, found in ends.items()}


def _ends(path: str) -> list[str]:
    """Returns the path's last part, its last two parts, and so on."""
    parts = Path(path.removesuffix(".gguf")).parts
    return [str(Path(*parts[-count:])) for count in range(1, len(parts) + 1)]


def read_texts(request: EvaluationRequest, tokenizer: Any) -> Texts:
    """Tokenizes the texts of an evaluation into samples, with the reference's tokenizer.

    Raises InputError where a text is missing or too short for one sample, UsageError where a text is given twice.
    """
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
