"""What lies in every file of an output: what guards its bytes in dsquant.json, and the writing of that record."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from dsquant.files.disk import write_atomically
from dsquant.files.sealing import hash_files, record_of_folder, seal
from dsquant.formats.gguf.files import GgufFile
from dsquant.formats.gguf.imatrix import stored_tensors
from dsquant.formats.scales import SCALES_FILE, open_scales, write_scales
from dsquant.formats.shards import ShardPlan
from dsquant.jobs.folder import RECORD_FILE, Job
from dsquant.pipeline.gguf_units import IMATRIX_FILE, GgufRun
from dsquant.pipeline.plan import Unit
from dsquant.pipeline.units import Run
from dsquant.source.shards import ShardIndex

Tensors = dict[str, dict[str, list[Any]]]
"""File -> tensor -> dtype, SHA-256 and extents."""


def run_tensors(run: Run) -> Tensors:
    """Writes the folded scales beside every output, and lists all tensors of all files.

    Args:
        run: the finished run.

    Returns:
        Every file that holds tensors.
    """
    plan, found = run.source.plan, Tensors()
    for target in plan.targets:
        found |= shard_tensors(target.folder, target.shards, _hashes(run.job.journal.units, target.folder))
        found |= _scale_tensors(run.job, plan.units, target.folder)
    for folder, gguf_target in plan.gguf.items():
        found |= _gguf_tensors(run.job, folder, gguf_target.files)
        found |= _scale_tensors(run.job, plan.units, folder)
    return found


def gguf_tensors(run: GgufRun) -> Tensors:
    """The same for a conversion to GGUF.

    Args:
        run: the finished conversion.

    Returns:
        Every file that holds tensors.
    """
    folder = PurePosixPath(".")
    found = _gguf_tensors(run.job, folder, run.plan.target.files)
    return found | (_scale_tensors(run.job, run.plan.units, folder) if run.plan.linears else {})


def shard_tensors(folder: PurePosixPath, shards: ShardPlan, hashes: Mapping[str, str]) -> Tensors:
    """The tensors of safetensors files.

    Args:
        folder: where they lie in the output folder.
        shards: the plan.
        hashes: tensor -> SHA-256.

    Returns:
        Their entries.
    """
    return {
        str(folder / shard.file_name): {
            tensor.name: [tensor.dtype, hashes[tensor.name], *tensor.shape] for tensor in shard.tensors
        }
        for shard in shards.shards
    }


def scale_tensors(folder: PurePosixPath, scales: ShardIndex, hashes: Mapping[str, str]) -> Tensors:
    """The tensors of dsquant.scales.

    Args:
        folder: where it lies in the output folder.
        scales: its index.
        hashes: producer -> SHA-256.

    Returns:
        Its entry.
    """
    return {str(folder / SCALES_FILE): {name: ["F32", hashes[name], *info.shape] for name, info in scales.items()}}


def _scale_tensors(job: Job, units: Iterable[Unit], folder: PurePosixPath) -> Tensors:
    hashes = write_scales(job.work, (unit.name for unit in units), job.output, str(folder))
    return scale_tensors(folder, open_scales(job.output / folder), hashes)


def _gguf_tensors(job: Job, folder: PurePosixPath, files: Iterable[GgufFile]) -> Tensors:
    hashes = _hashes(job.journal.units, folder)
    found: Tensors = {
        str(folder / file.file_name): {
            tensor.name: [tensor.type_name, hashes[tensor.name], *tensor.shape] for tensor in file.tensors
        }
        for file in files
    }
    if (job.output / folder / IMATRIX_FILE).is_file():
        found[str(folder / IMATRIX_FILE)] = stored_tensors(job.output / folder / IMATRIX_FILE)
    return found


def _hashes(journal: Mapping[str, Mapping[str, Any]], folder: PurePosixPath) -> dict[str, str]:
    return {name: found for entry in journal.values() for name, found in entry["tensors"].get(str(folder), {}).items()}


def write_record(
    output: Path, record: dict[str, Any], names: Iterable[str], tensors: Tensors, after_file: Callable[[str], None]
) -> dict[str, Any]:
    """Hashes every file of an output and writes its record, the last file of all.

    Each folder inside gets a record of its own, of what lies in it: it stays whole when it is moved alone.

    Args:
        output: the output folder.
        record: everything but the files.
        names: paths in the output folder; those that are not there are left out.
        tensors: what the files that hold tensors hold.
        after_file: called with each hashed file's name; may raise to stop.

    Returns:
        The record.
    """
    folders = {PurePosixPath(entry["folder"]) for entry in record["outputs"].values()}
    folders = {folder.parent if folder.suffix == ".gguf" else folder for folder in folders} - {PurePosixPath(".")}
    records = {str(folder / RECORD_FILE) for folder in (*folders, PurePosixPath("."))}
    there = [name for name in names if name not in records and (output / name).is_file()]
    files = hash_files(output, there, after_file)
    for name, held in tensors.items():
        files[name]["tensors"] = held
    for folder in sorted(folders):
        part = record_of_folder({**record, "files": files}, folder, RECORD_FILE)
        write_atomically(output / folder / RECORD_FILE, seal(part))
        files |= hash_files(output, [str(folder / RECORD_FILE)], after_file)
    record = {**record, "files": dict(sorted(files.items()))}
    write_atomically(output / RECORD_FILE, seal(record))
    return record
