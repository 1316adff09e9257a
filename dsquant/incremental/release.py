"""Implements `dsquant delta`: compares two releases, builds the new output from the old one, and writes a patch."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsquant.errors import InputError, UsageError
from dsquant.escaping import counted
from dsquant.files.foreign import read_file
from dsquant.files.sealing import broken_sections
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.incremental.applying import AppliedPatch, apply_patch
from dsquant.incremental.patch import write_patch
from dsquant.incremental.places import check_output, check_patch, with_ending
from dsquant.incremental.recording import Recording, open_recording
from dsquant.incremental.requantize import requantize
from dsquant.incremental.reuse import ways_of
from dsquant.jobs.folder_state import RECORD_FILE, claim
from dsquant.jobs.stopping import full_disk_is_resumable, stop_on_signals
from dsquant.options import format_size
from dsquant.pipeline.result import Result, result_of
from dsquant.reporting.notebook import Shown
from dsquant.reporting.progress import Progress, Report, peak_resident_bytes, silent
from dsquant.running import Again, DeltaOptions
from dsquant.source.locate import locate
from dsquant.source.scan import scan
from dsquant.verification.strict_record import read_record


@dataclass(frozen=True)
class Delta(Shown):
    """Changes, reuse and sizes of a delta."""

    output: Path
    patch: Path
    patch_bytes: int
    """The patch's size on disk."""
    output_bytes: int
    """Size of all files of the output."""
    parameters: int
    changed: list[str]
    """Parameters whose source has changed."""
    anew: list[str]
    """Format and linear that got a new grid, since the recorded one no longer fits."""
    old_read_bytes: int
    """Tensor data read of the old release; 0 where its recorded hashes were used."""
    new_read_bytes: int
    """Tensor data read of the new release."""
    reused: dict[str, int] = field(default_factory=dict)
    """How files were reused (reflink, hard link, copy) -> number of files."""
    reused_bytes: int = 0
    already_finished: bool = False

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {**vars(self), "output": str(self.output), "patch": str(self.patch)}

    def tables(self) -> Iterator[Any]:
        """Yields lines on what changed, was reused and read, and the patch's size."""
        from rich.text import Text

        if self.already_finished:
            yield Text(f"{self.output} is finished already; only the patch was written.")
        yield Text(
            f"{len(self.changed)} of {counted(self.parameters, 'parameter')} changed and were made with the recorded "
            f"scales, {counted(len(self.anew), 'linear')} on a new grid."
        )
        yield Text(f"Files reused: {ways_of(self.reused)} ({format_size(self.reused_bytes)}).")
        old = f", {format_size(self.old_read_bytes)} of the old one" if self.old_read_bytes else ""
        yield Text(f"Read: {format_size(self.new_read_bytes)} of the new release{old}.")
        output, patch = format_size(self.output_bytes), format_size(self.patch_bytes)
        share = f"{self.patch_bytes / self.output_bytes:.1%}"
        yield Text(f"Output: {output}. Patch: {patch}, {share} of that. To apply it to the old output:")
        yield Text(f"  dsquant delta --apply {self.patch} OLD_OUTPUT --output DIR", overflow="fold", no_wrap=True)


def delta(old: str, new: str, output: Path, asked: DeltaOptions, report: Report = silent) -> Delta:
    """Builds the output of a new release from the old release's output, and the patch between the two outputs.

    The old release is read once and compared with the old output's recording; where `old` is the old output itself, its
    recorded hashes stand for the release. Raises InputError where a release or output cannot be used, they do not
    belong together, or foreign files are in the place of the patch or the output; UsageError where the old output is
    not given, or holds GGUF files; Interrupted where the job stopped and can be resumed.
    """
    folder = Path(old).expanduser()
    is_output = (folder / RECORD_FILE).is_file()
    recording = open_recording(folder if is_output else asked.quantized or _default_output(old))
    recipe = recording.recipe(new, output)
    patch = asked.patch or with_ending(output, ".patch")
    check_output(output, recording.output)
    claim(output, recipe, asked.resume, asked.restart)
    check_patch(patch, output, recording, again=asked.resume or asked.restart)
    old_read_bytes = 0 if is_output else _check_old(old, recording, report)
    done = requantize(recipe, recording, True, asked, report)

    def safe_point(name: str) -> None:
        request.safe_point()
        report(Progress("hash", 0, 1, name))

    with stop_on_signals() as request, full_disk_is_resumable():
        write_patch(recording.output, output, patch, safe_point)
        report(Progress("hash", 1, 1, ""))
    return Delta(
        output=output,
        patch=patch,
        patch_bytes=patch.stat().st_size,
        output_bytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        parameters=done.record["changes"]["parameters"],
        changed=done.record["changes"]["changed"],
        anew=done.record["changes"]["anew"],
        old_read_bytes=old_read_bytes,
        new_read_bytes=done.read_bytes,
        reused=dict(done.reused),
        reused_bytes=done.reused_bytes,
        already_finished=done.already_finished,
    )


def _default_output(old: str) -> Path:
    """Returns the default output of `dsquant awq` for the old release."""
    records = [path / RECORD_FILE for path in sorted(Path().glob(f"{Path(old).name}-*-*bit"))]
    whole = [path for path in records if path.is_file() and not broken_sections(read_file(path))]
    made = [path.parent for path in whole if read_record(path)["recipe"]["model"] == old]
    if len(made) != 1:
        raise UsageError(f"name the output that was made from {old} with --quantized; its scales are needed")
    return made[0]


def _check_old(old: str, recording: Recording, report: Report) -> int:
    """Reads the old release once and compares it with the recording; returns the bytes read."""
    index = open_checkpoint(locate(old)).index
    done = 0

    def after_tensor(name: str) -> None:
        nonlocal done
        request.safe_point()
        done += 1
        report(Progress("scan", done, len(index), name, index.bytes_read))

    with stop_on_signals() as request:
        hashes = scan(index, after_tensor)
    before = recording.source_hashes
    other = next((name for name in hashes.keys() | before.keys() if hashes.get(name) != before.get(name)), None)
    if other is not None:
        raise InputError(f"{recording.output} was not made from {old}: tensor {other!r} differs there")
    return index.bytes_read


def apply(patch: Path, old: Path, output: Path, report: Report = silent) -> AppliedPatch:
    """Builds the new output from the old one and a patch; raises InputError where they are damaged or do not match."""
    with (
        stop_on_signals() as request,
        full_disk_is_resumable("nothing is left of it: free some space and apply it again"),
    ):

        def safe_point(name: str) -> None:
            request.safe_point()
            report(Progress("hash", 0, 1, name))

        applied = apply_patch(patch, old, output, safe_point)
        report(Progress("hash", 1, 1, ""))
        return applied


def full_run(
    model: str, scales_from: Path, output: Path, again: Again | None = None, report: Report = silent
) -> Result:
    """Quantizes a whole release under an earlier output's scales: the reference for a delta.

    Raises InputError where the release or
    the earlier output cannot be used, UsageError where the earlier output holds GGUF files, Interrupted where the job
    stopped and can be resumed.
    """
    started = time.monotonic()
    recording = open_recording(scales_from)
    recipe = recording.recipe(model, output)
    done = requantize(recipe, recording, False, again or Again(), report)
    return result_of(
        recipe,
        done.record,
        already_finished=done.already_finished,
        elapsed_s=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
    )
