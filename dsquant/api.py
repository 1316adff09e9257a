"""The Python API: each command as a function. Heavy imports happen in the calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsquant.inspection import Inspection
    from dsquant.pipeline import Evaluation, Result


def awq(
    model: str | Path = "tiny-r1",
    *,
    output: str | Path,
    to: str | Sequence[str] = "awq",
    resume: bool = False,
    restart: bool = False,
    progress: bool = True,
    **recipe: Any,
) -> Result:
    """Quantizes a model.

    Args:
        model: a folder, a hub id, or `tiny-r1`.
        output: the folder to make.
        to: `awq`, `compressed-tensors`, or both.
        resume: go on with an interrupted job in `output`, or begin one.
        restart: begin anew where `output` holds an interrupted or finished job.
        progress: whether to show a progress bar.
        **recipe: any other field of `dsquant.recipe.Recipe`, such as bits=4, group_size=128, preset="compact".

    Returns:
        Where the files are and what quantization cost; a table in a notebook.

    Raises:
        UsageError: where the arguments cannot work.
        InputError: where model, texts or output folder cannot be used; nothing was written.
        Interrupted: where the job stopped and can be resumed.
    """
    from dsquant import pipeline
    from dsquant.display import progress_bar
    from dsquant.recipe import Recipe, parse_size

    formats = (to,) if isinstance(to, str) else tuple(to)
    for field in ("memory_budget", "max_shard_bytes"):
        if isinstance(recipe.get(field), str):
            recipe[field] = parse_size(recipe[field])
    checked = Recipe.checked(model=str(model), output=Path(output), to=formats, **recipe)
    with progress_bar(progress) as report:
        return pipeline.awq(checked, resume, restart, report)


def evaluate(
    reference: str | Path,
    candidate: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    seq_len: int = 512,
    samples: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Measures how far a quantized model is from the original, layer by layer.

    Args:
        reference: the original: a folder, a hub id, or `tiny-r1`.
        candidate: an AWQ, compressed-tensors, FP8 or BF16 checkpoint of the same model.
        texts: text files; the shipped held-out texts where there are none.
        seq_len: tokens of a sample.
        samples: samples of each text.
        progress: whether to show a progress bar.

    Returns:
        Perplexity, KL divergence and top-1 agreement on each text; a table in a notebook.

    Raises:
        InputError: where a model or text cannot be used, or the two are not the same model.
    """
    from dsquant import pipeline
    from dsquant.display import progress_bar

    with progress_bar(progress) as report:
        return pipeline.evaluate(
            str(reference), str(candidate), [str(text) for text in texts], seq_len, samples, report
        )


def inspect(model: str | Path = "tiny-r1") -> Inspection:
    """Describes a checkpoint from its headers alone.

    Args:
        model: a folder, a hub id, or `tiny-r1`.

    Returns:
        Architecture, layers, tensors and bytes by kind.

    Raises:
        InputError: where it cannot be read, or is not of a family that dsquant knows.
    """
    from dsquant.inspection import describe

    return describe(str(model))
