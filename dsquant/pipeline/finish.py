"""What makes written tensors an output: files beside them, the comparison with the original, the record last."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsquant.evaluation.held_out import Comparison, compare_on_texts
from dsquant.evaluation.opening import open_gguf
from dsquant.files.disk import write_atomically
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.shards import write_index
from dsquant.pipeline import card
from dsquant.pipeline.gguf_units import GgufRun, write_observed_imatrix
from dsquant.pipeline.manifest import gguf_tensors, run_tensors, write_record
from dsquant.pipeline.plan import Target
from dsquant.pipeline.record import gguf_output_files, gguf_record, output_files, run_record
from dsquant.pipeline.units import Run
from dsquant.reporting.progress import Stage


def finish(run: Run, more: Mapping[str, Any] | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Writes what makes the shards a checkpoint, evaluates it, and writes the record last.

    Args:
        run: the run, with every unit made.
        more: further sections of the record.
        notes: further warnings.

    Returns:
        The record.
    """
    source, plan = run.source, run.source.plan
    for target in plan.targets:
        folder = run.job.output / target.folder
        card.copy_files(source.checkpoint.folder, folder)
        write_atomically(folder / card.CONFIG_FILE, _json(_config(run, target)))
        write_index(folder, target.shards)
    for gguf_folder, files in run.gguf_files.items():
        files.finish()
        write_observed_imatrix(run.job.work, run.job.output / gguf_folder, plan.units, source.calibration)
    record = run_record(run, _evaluate(run) if run.recipe.evaluate else {})
    record |= more or {}
    record["warnings"] = [*record["warnings"], *notes]
    for target in plan.targets:
        folder = run.job.output / target.folder
        write_atomically(folder / card.CARD_FILE, card.model_card(record, target.format.name).encode())
    names = output_files(source)
    record = write_record(run.job.output, record, names, run_tensors(run), _hashing(names, run.safe_point))
    run.tell("hash", len(names), len(names), "")
    return record


def finish_gguf(run: GgufRun) -> dict[str, Any]:
    """Ends the files, writes the imatrix, evaluates, and writes the record last.

    Args:
        run: the run, with every unit made.

    Returns:
        The record.
    """
    plan, output = run.plan, run.job.output
    run.files.finish()
    if plan.calibration is not None:
        write_observed_imatrix(run.job.work, output, plan.units, plan.calibration)
    record, names = gguf_record(run, _evaluate_gguf(run) if run.recipe.evaluate else {}), gguf_output_files(plan)
    record = write_record(output, record, names, gguf_tensors(run), _hashing(names, run.safe_point))
    run.tell("hash", len(names), len(names), "")
    return record


def _evaluate_gguf(run: GgufRun) -> dict[str, dict[str, Any]]:
    """Compares the files with the original on the shipped held-out texts."""
    plan = run.plan
    candidate = open_gguf(run.job.output / plan.target.files[0].file_name, plan.checkpoint)
    candidates = {plan.target.name: candidate}
    compared = Comparison(
        plan.skeleton, plan.checkpoint.weights, candidates, run.job.work, run.batch_samples, run.safe_point
    )
    return compare_on_texts(compared, plan.tokenizer, run.recipe.seq_len)


def _evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """Compares every output with the original on the shipped held-out texts."""
    source = run.source
    candidates = {
        target.format.name: open_checkpoint(run.job.output / target.folder).weights for target in source.plan.targets
    }
    for folder, target in source.plan.gguf.items():
        file = run.job.output / folder / target.files[0].file_name
        candidates[target.name] = open_gguf(file, source.checkpoint)
    original = open_checkpoint(source.checkpoint.folder).weights
    compared = Comparison(source.skeleton, original, candidates, run.job.work, run.batch_samples, run.safe_point)
    return compare_on_texts(compared, source.tokenizer, run.recipe.seq_len)


def _hashing(names: list[str], safe_point: Callable[[Stage, int, int, str], None]) -> Callable[[str], None]:
    """Tells of hashed files."""
    done = 0

    def after_file(name: str) -> None:
        nonlocal done
        done += 1
        safe_point("hash", done, len(names), name)

    return after_file


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _config(run: Run, target: Target) -> dict[str, Any]:
    """The source's config.json with the target's quantization_config in place of the FP8 one."""
    source = run.source
    dropped = ("quantization_config", "auto_map")
    config = {key: value for key, value in source.checkpoint.config.items() if key not in dropped}
    layers = source.skeleton.layers
    if run.recipe.mtp == "drop" and source.skeleton.num_mtp_layers:
        config["num_nextn_predict_layers"] = 0
        layers = layers[: source.skeleton.num_layers]
    chosen = source.plan.linears[target.grid]
    linears = {linear: linear in chosen for layer in layers for linear in layer.linears}
    config["quantization_config"] = target.format.quantization_config(target.grid, linears, target.widths)
    return config
