"""Compares models on texts: what `dsquant eval` does, and every job at its end."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.calibration import calibration_tokens, held_out_tokens, load_tokenizer
from dsquant.errors import InputError
from dsquant.evaluation.divergence import Divergence, compare
from dsquant.jobs import stop_on_signals
from dsquant.model.families import family_of
from dsquant.model.skeleton import Skeleton
from dsquant.planning import BATCH_TOKENS, check_complete
from dsquant.source.checkpoint import Checkpoint, open_checkpoint
from dsquant.source.gguf_weights import GgufWeights, gguf_file
from dsquant.source.locate import locate
from dsquant.source.weights import Weights
from dsquant.telemetry import Progress, Report, Stage, silent

EVALUATION_TEXTS = ("code", "wiki", "reasoning")
EVALUATION_SAMPLES = 8
EVALUATION_SEQ_LEN = 512


@dataclass(frozen=True)
class Evaluation:
    """How far a candidate is from a reference."""

    reference: str
    candidate: str
    texts: dict[str, Divergence]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "texts": {name: vars(found) for name, found in self.texts.items()}}


def evaluate(
    reference: str, candidate: str, texts: list[str], seq_len: int, samples: int, report: Report = silent
) -> Evaluation:
    """Compares a candidate with a reference, layer by layer.

    Args:
        reference: the original: a folder, a hub id, or `tiny-r1`.
        candidate: a checkpoint of the same model.
        texts: text files; the shipped held-out texts where there are none.
        seq_len: tokens of a sample.
        samples: the most samples of each text.
        report: gets the progress.

    Returns:
        The distance on each text.

    Raises:
        InputError: where a model or a text cannot be used, or the two are not the same model.
        Interrupted: where a signal stopped it.
    """
    original = open_checkpoint(locate(reference))
    other = open_candidate(candidate, original)
    skeleton = Skeleton(original)
    check_complete(original, skeleton)
    _check_same_model(skeleton, candidate, other)
    tokenizer = load_tokenizer(original.folder)
    found = {}
    with stop_on_signals() as request, tempfile.TemporaryDirectory(prefix="dsquant-") as work:
        chosen = texts or list(EVALUATION_TEXTS)
        for number, text in enumerate(chosen):
            if texts:
                tokens_NT = calibration_tokens([text], tokenizer, samples, seq_len, 0).tokens
            else:
                tokens_NT = held_out_tokens(text, tokenizer, seq_len, samples)

            def safe_point(done: int, total: int, what: str, number: int = number) -> None:
                request.safe_point()
                report(Progress("evaluate", number * total + done, len(chosen) * total, what))

            scores = compare(
                skeleton,
                original.weights,
                {"candidate": other},
                tokens_NT,
                Path(work),
                max(1, BATCH_TOKENS // seq_len),
                safe_point,
            )
            found[Path(text).name] = scores["candidate"].summary()
    return Evaluation(reference, candidate, found)


def open_candidate(candidate: str, original: Checkpoint) -> Weights:
    """Opens a candidate's weights under the original's names.

    Args:
        candidate: a checkpoint's folder or hub id, a GGUF file, or a folder with one.
        original: the original.

    Returns:
        The weights, decoded on access.

    Raises:
        InputError: where it cannot be read, or is of another architecture.
    """
    file = gguf_file(Path(candidate).expanduser())
    if file is None:
        return open_checkpoint(locate(candidate)).weights
    family_of(original.folder, original.config)
    return open_gguf(file, original)


def open_gguf(file: Path, original: Checkpoint) -> Weights:
    """Opens a GGUF file's weights under the names of the checkpoint that it was made from.

    Args:
        file: the file, or the first of a split one.
        original: the checkpoint.

    Returns:
        The weights, decoded on access.
    """
    weights = original.weights
    return GgufWeights(file, {name: weights.shape(name) for name in weights}, original.config)


def _check_same_model(skeleton: Skeleton, candidate: str, other: Weights) -> None:
    """Refuses a candidate whose weights are not the reference's in other storage."""
    for name, shape in skeleton.expected_shapes().items():
        if int(name.split(".")[2]) >= skeleton.num_layers if name.startswith("model.layers.") else False:
            continue  # the candidate may have dropped the MTP layer
        if name not in other:
            raise InputError(f"{candidate}: tensor {name!r} is missing, which the reference has; not the same model")
        if other.shape(name) != shape:
            raise InputError(
                f"{candidate}: tensor {name!r} has shape {list(other.shape(name))}, the reference's has "
                f"{list(shape)}; not the same model"
            )


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
    """Compares models on the shipped held-out texts.

    Args:
        models: the models.
        tokenizer: the original's.
        seq_len: tokens of a sample, at the most.

    Returns:
        Candidate -> text -> the fields of a `Divergence`.
    """
    seq_len = min(EVALUATION_SEQ_LEN, seq_len)
    found: dict[str, dict[str, Any]] = {name: {} for name in models.candidates}
    for number, text in enumerate(EVALUATION_TEXTS):
        tokens_NT = held_out_tokens(text, tokenizer, seq_len, EVALUATION_SAMPLES)

        def safe_point(done: int, total: int, what: str, number: int = number) -> None:
            models.safe_point("evaluate", number * total + done, len(EVALUATION_TEXTS) * total, what)

        scores = compare(
            models.skeleton,
            models.original,
            models.candidates,
            tokens_NT,
            models.work,
            models.batch_samples,
            safe_point,
        )
        for name, token_scores in scores.items():
            found[name][text] = vars(token_scores.summary())
    return found
