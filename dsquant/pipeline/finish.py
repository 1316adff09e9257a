"""Completes an output: the files that go with its tensors, the comparison with the original, the record last."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dsquant.evaluation.divergence import ComparedModels
from dsquant.evaluation.held_out import compare_on_texts
from dsquant.files.disk import write_atomically
from dsquant.formats.protocol import Target
from dsquant.formats.wanted import PICTURE_FILE
from dsquant.pipeline.card import model_card
from dsquant.pipeline.kept import kept_file, kept_of
from dsquant.pipeline.manifest import run_tensors, write_record
from dsquant.pipeline.record import output_files, run_record
from dsquant.pipeline.run_state import Run
from dsquant.precision.groups import by_output
from dsquant.precision.picture import choice_picture
from dsquant.reporting.progress import Stage
from dsquant.source.license import CARD_FILE


def finish(run: Run, more: Mapping[str, Any] | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the files that make the shards a checkpoint, evaluates it, and writes and returns the record, with `more`
    sections and the warnings `notes`, last."""
    source, targets = run.source, run.source.plan.targets
    files = [run.job.work / kept_file(unit.name) for unit in source.plan.units]
    for target, opened in zip(targets, run.opened, strict=True):
        opened.finish(kept_of(files, str(target.folder)), source.calibration)
    record = run_record(run, _evaluate(run) if run.recipe.evaluate else {})
    record |= more or {}
    record["warnings"] = [*record["warnings"], *notes]
    for target in targets:
        write_atomically(run.job.output / target.folder / CARD_FILE, model_card(record, target.name).encode())
        for name, text in _about_choice(target, record).items():
            write_atomically(run.job.output / target.folder / name, text.encode())
    names = output_files(source)
    hashed = {str(path.relative_to(run.job.output)): entry for path, entry in run.hashes.whole().items()}
    after_file = _hashing(names, run.safe_point)
    record = write_record(run.job.output, record, names, run_tensors(run), after_file, hashed)
    run.tell("hash", len(names), len(names), "")
    return record


def _about_choice(target: Target, record: Mapping[str, Any]) -> dict[str, str]:
    """The files beside an output whose widths were chosen."""
    found = dict(target.choice_lines)
    if PICTURE_FILE in target.file_names():
        found[PICTURE_FILE] = choice_picture(by_output(record["precision"], record["outputs"])[target.name])
    return found


def _evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """Compares every output with the original on the shipped held-out texts."""
    source, output = run.source, run.job.output
    candidates = {target.name: target.candidate(output, source.checkpoint) for target in source.plan.targets}
    original = source.checkpoint.weights
    models = ComparedModels(source.skeleton, original, candidates, run.batch_samples)
    safe_point = partial(run.safe_point, "evaluate")
    return compare_on_texts(models, source.tokenizer, run.recipe.seq_len, run.job.work, safe_point)


def _hashing(names: list[str], safe_point: Callable[[Stage, int, int, str], None]) -> Callable[[str], None]:
    """Tells of hashed files."""
    done = 0

    def after_file(name: str) -> None:
        nonlocal done
        done += 1
        safe_point("hash", done, len(names), name)

    return after_file
