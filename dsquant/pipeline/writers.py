"""What a unit of an output is written into: the formats' files, scales, and hidden states for the next layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsquant.formats.protocol import Target, UnitWriter
from dsquant.model.activations import Activations
from dsquant.model.passed_on import PassedOn
from dsquant.pipeline.kept import keep_by_folder, kept_file, scales_file
from dsquant.pipeline.planning import Unit
from dsquant.pipeline.run_state import Run
from dsquant.quantization.statistics import Importance
from dsquant.schemes import QuantizedWeight, Scheme


@dataclass
class Writers:
    """Everything that one unit is written into."""

    by_target: list[tuple[Target, UnitWriter]] = field(default_factory=list)
    hidden: list[tuple[Activations, Path]] = field(default_factory=list)
    """Hidden states that nobody changes any more, and the files that they go into."""
    passed_on: list[tuple[PassedOn, Path]] = field(default_factory=list)
    """Those that the next layer reads from memory."""
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Folder -> producer -> the scales that were folded."""

    def emit(self, grid: Scheme, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        for target, writer in self.by_target:
            if target.grid == grid:
                writer.write(name, value)

    def note(self, grid: Scheme, linear: str, importance: Importance) -> None:
        for target, writer in self.by_target:
            if target.grid == grid:
                writer.note(linear, importance.squares_I, importance.count)
                if importance.largest is not None:
                    writer.note_largest(linear, importance.largest)

    def keep_scales(self, grid: Scheme, producer: str, scales_I: torch.Tensor) -> None:
        for target, _ in self.by_target:
            if target.grid == grid:
                self.scales.setdefault(str(target.folder), {})[producer] = scales_I.to("cpu", copy=True)

    def finish(self, run: Run, unit: Unit, safe_point: Callable[[str], None]) -> dict[str, dict[str, str]]:
        """Writes the rest and brings the formats' files to disk; returns folder -> tensor -> SHA-256."""
        for _, writer in self.by_target:
            writer.copy_rest(safe_point)
        hashes = {str(target.folder): writer.commit() for target, writer in self.by_target}
        run.bytes_written += sum(writer.bytes_written for _, writer in self.by_target)
        kept = {str(target.folder): writer.kept for target, writer in self.by_target}
        scales: dict[str, dict[str, torch.Tensor]] = {}
        for part in run.ranks.gather(self.scales):
            for name, found in part.items():
                scales.setdefault(name, {}).update(found)
        run.ranks.once(lambda: keep_by_folder(run.job.work / scales_file(unit.name), scales))
        run.ranks.once(lambda: keep_by_folder(run.job.work / kept_file(unit.name), kept))
        return hashes

    def save_hidden(self, run: Run) -> None:
        """Writes hidden states into their files, which need not be on disk yet, and lets go of them."""
        while self.hidden:
            run.save(*self.hidden.pop())

    def save_passed_on(self) -> None:
        """Writes into their files what the next layer reads meanwhile."""
        for place, (passed_on, path) in enumerate(self.passed_on):
            try:
                passed_on.save(path)
            except BaseException as error:
                for behind, _ in self.passed_on[place + 1 :]:
                    behind.fail(error)
                raise

    @property
    def weight_errors(self) -> dict[str, dict[str, float]]:
        """Folder -> parameter -> error, of the formats that round themselves."""
        errors = {str(target.folder): writer.weight_errors for target, writer in self.by_target}
        return {folder: found for folder, found in errors.items() if found is not None}


@contextmanager
def unit_writers(run: Run, unit: Unit) -> Iterator[Writers]:
    """Opens a unit in every output; what is not committed when the block ends is given up."""
    writers = Writers()

    def begin() -> None:
        for target, opened in zip(run.source.plan.targets, run.opened, strict=True):
            writers.by_target.append((target, opened.unit(unit.name, unit.parameters)))

    try:
        run.ranks.after_first(begin)
        yield writers
    finally:
        for _, writer in writers.by_target:
            writer.discard()
