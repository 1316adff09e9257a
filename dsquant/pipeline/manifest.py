"""What lies in every file of an output: what guards its bytes in dsquant.json, and the writing of that record."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch

from dsquant.files.disk import write_atomically
from dsquant.files.sealing import hash_files, record_of_folder, seal
from dsquant.formats.protocol import Contents
from dsquant.formats.scales import SCALES_FILE, open_scales, store_scales
from dsquant.jobs.folder import Job
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.pipeline.kept import kept_of, scales_file
from dsquant.pipeline.run_state import Run


def run_tensors(run: Run) -> Contents:
    """Writes the folded scales next to every output, and lists the tensors of every file of a finished run."""
    found = Contents()
    for target in run.source.plan.targets:
        found |= target.contents(tensor_hashes(run.job.journal.units, target.folder), run.job.output)
        if target.linears:
            found |= _scale_tensors(run.job, [unit.name for unit in run.source.plan.units], target.folder)
    return found


def _scale_tensors(job: Job, units: Iterable[str], folder: PurePosixPath) -> Contents:
    """Writes an output's dsquant.scales and lists what is in it."""
    scales: dict[str, torch.Tensor] = {}
    for part in kept_of((job.work / scales_file(unit) for unit in units), str(folder)):
        scales |= part
    hashes = store_scales(job.output / folder, scales)
    index = open_scales(job.output / folder)
    held = {name: ["F32", hashes[name], *info.shape] for name, info in index.items()}
    return {str(folder / SCALES_FILE): {"tensors": held}}


def tensor_hashes(journal: Mapping[str, Mapping[str, Any]], folder: PurePosixPath) -> dict[str, str]:
    """Returns the SHA-256 of each tensor of an output folder, as the units' lines in the journal have it."""
    return {name: found for entry in journal.values() for name, found in entry["tensors"].get(str(folder), {}).items()}


def write_record(
    output: Path,
    record: dict[str, Any],
    names: Iterable[str],
    tensors: Contents,
    after_file: Callable[[str], None],
    hashed: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Hashes every file of an output and writes its record, the last file of all, which it returns.

    Each folder inside gets a record of its own content: it stays whole when it is moved alone. `record` is everything
    but the files, `names` are paths in the output folder (those that are not there are left out), `tensors` the content
    of the files that hold tensors; `hashed` is path -> bytes and sha256 of those that are hashed already, `after_file`
    gets the name of each other and may raise to stop.
    """
    folders = {PurePosixPath(entry["folder"]) for entry in record["outputs"].values()}
    folders = {folder.parent if folder.suffix == ".gguf" else folder for folder in folders} - {PurePosixPath(".")}
    records = {str(folder / RECORD_FILE) for folder in (*folders, PurePosixPath("."))}
    there = [name for name in names if name not in records and (output / name).is_file()]
    found = {**hashed, **hash_files(output, [name for name in there if name not in hashed], after_file)}
    files = {name: {**found[name]} for name in there}
    for name, entry in tensors.items():
        files[name] |= entry
    for folder in sorted(folders):
        part = record_of_folder({**record, "files": files}, folder, RECORD_FILE)
        write_atomically(output / folder / RECORD_FILE, seal(part))
        files |= hash_files(output, [str(folder / RECORD_FILE)], after_file)
    record = {**record, "files": dict(sorted(files.items()))}
    write_atomically(output / RECORD_FILE, seal(record))
    return record
