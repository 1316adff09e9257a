"""What the rest of dsquant knows of an output format: how an output is planned, written unit by unit, and finished.

A `Format` plans a `Target`: all of an output that headers tell. A running job opens it, and the `OpenTarget` gives a
`UnitWriter` for each unit of the job (embedding, layer, head).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import torch

from dsquant.formats.wanted import NO_CHOICE, Choice, Choosable, Wanted, Width
from dsquant.formats.write_behind import WriteBehind
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.scan import Look, unseen
from dsquant.source.weights import Weights

Contents = dict[str, dict[str, Any]]
"""File in the output folder -> what the record tells of it: `tensors`, each with its dtype or type, SHA-256, and shape;
and `metadata`, what a safetensors header says of its format where that is not `pt`."""


@dataclass(frozen=True)
class ScaledLinear:
    """A linear under the scales that will be folded in."""

    name: str
    weight_OI: torch.Tensor
    """float32."""
    importance: Mapping[str, tuple[torch.Tensor, int]]
    """Linear, with `KEYS_SUFFIX` for kv_b_proj's keys -> sums of squared inputs, float32 [I], of keys [H, N]; and the
    tokens behind them."""


@dataclass(frozen=True)
class Surroundings:
    """What writing needs of the running job."""

    checkpoint: Checkpoint
    output: Path
    """The job's output folder."""
    work: Path
    """The job's work folder."""
    ranks: Ranks = ALONE
    write_behind: WriteBehind | None = None
    """Writes what comes from a GPU."""


class UnitWriter(ABC):
    """Writes one unit of one output."""

    def __init__(self) -> None:
        self.bytes_written = 0

    @abstractmethod
    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        """Writes a linear's quantized weight, or a parameter's float32 values."""

    def note(self, linear: str, squares: torch.Tensor, count: int) -> None:  # noqa: B027 - most formats need none
        """Notes how much each input column of a linear matters, before it is written.

        Args:
            linear: its name; kv_b_proj's with `KEYS_SUFFIX` for its keys alone.
            squares: float32 [I], sums of squared inputs; [H, N] for keys.
            count: tokens behind the sums.
        """

    @abstractmethod
    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Writes the unit's parameters that nothing has changed, in parts of bounded size."""

    @abstractmethod
    def commit(self) -> dict[str, str]:
        """Brings the unit to disk; returns tensor name -> SHA-256."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what is unfinished; does nothing after `commit`."""

    @property
    def weight_errors(self) -> dict[str, float] | None:
        """Parameter -> the stored rows' relative distance, where the format rounds itself."""
        return None

    @property
    def kept(self) -> Mapping[str, torch.Tensor]:
        """Tensors that `OpenTarget.finish` needs of the unit, for the work folder."""
        return {}


class OpenTarget(ABC):
    """An output that is being written."""

    @abstractmethod
    def unit(self, name: str, parameters: tuple[str, ...]) -> UnitWriter:
        """Begins a unit with these parameters."""

    @abstractmethod
    def finish(self, kept: Iterable[Mapping[str, torch.Tensor]], calibration: Mapping[str, Any] | None) -> None:
        """Writes what makes an output of the units.

        Args:
            kept: what `UnitWriter.kept` was of each unit, in order.
            calibration: what the tokens were; None without.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing open
        """Closes what is open; what is on disk stays, for a resumed job."""


@dataclass(frozen=True)
class StoredFile:
    """A file of an interrupted job, as finished units have left it."""

    path: Path
    header: bytes
    num_bytes: int
    places: Mapping[str, tuple[int, int]]
    """Tensor -> where its data begin in the file, and their size; of finished units alone."""


@dataclass(frozen=True)
class Target(ABC):
    """One output, planned from headers."""

    name: str
    """What results and records call it."""
    folder: PurePosixPath
    """Inside the job's output folder."""
    grid: Grid
    """What scales are searched for."""
    linears: frozenset[str]
    """Those that are quantized onto the grid, or whose inputs are scaled for it."""
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """What a user should know, in words."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages that the record names, beside those of every job."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of all files with weights."""

    @property
    @abstractmethod
    def location(self) -> PurePosixPath:
        """The path that engines are given: the folder, or a file in it."""

    @property
    def storing_bytes(self) -> int:
        """Resident memory that storing a weight takes beyond the weight itself."""
        return 0

    @property
    def widths(self) -> Mapping[str, int]:
        """Quantized linear -> bits, where these were chosen; else all have the grid's."""
        return NO_CHOICE

    @property
    def facts(self) -> Mapping[str, Any]:
        """Notes of how this output is made, for job and record; a resumed job must find the same."""
        return {}

    @property
    def bytes_by_file(self) -> dict[str, int]:
        """Sizes of its files for a preview; of all together where there are many."""
        return {self.name: self.num_bytes}

    @property
    def details(self) -> Mapping[str, str]:
        """Rows of a preview."""
        return {}

    def look(self, checkpoint: Checkpoint) -> Look:
        """Returns what sees every tensor of the source while it is hashed, and raises InputError where one is out of
        the output's range."""
        return unseen

    @abstractmethod
    def file_names(self) -> list[str]:
        """Every file that may come to lie in its folder."""

    @abstractmethod
    def open(self, surroundings: Surroundings, resumed: bool) -> OpenTarget:
        """Opens the output for writing.

        Args:
            surroundings: of the job.
            resumed: whether finished units are there already.

        Returns:
            The output.

        Raises:
            InputError: where an interrupted job's files are gone or not the planned ones.
        """

    @abstractmethod
    def finished_files(self, output: Path, units: Sequence[str], tensors: Collection[str]) -> Iterable[StoredFile]:
        """Lists what finished units have left.

        Args:
            output: the job's output folder.
            units: the finished ones.
            tensors: theirs.

        Returns:
            The files.
        """

    @abstractmethod
    def candidate(self, output: Path, checkpoint: Checkpoint) -> Weights:
        """Reads the finished output back from the job's folder, for the comparison with the original checkpoint."""

    @abstractmethod
    def contents(self, hashes: Mapping[str, str], output: Path) -> Contents:
        """Lists what lies in its files.

        Args:
            hashes: tensor -> SHA-256.
            output: the job's output folder.

        Returns:
            Their entries for the record.
        """

    @abstractmethod
    def recorded(self, errors: Mapping[str, float]) -> dict[str, Any]:
        """Returns what the record tells of it.

        Args:
            errors: linear or parameter -> the relative error of its weight.

        Returns:
            Plain JSON values, `folder`, `bytes` and `weight_errors` among them.
        """

    @abstractmethod
    def choice(self, wanted: Wanted) -> Choice:
        """Lists what a target for bits or size leaves to choose.

        Args:
            wanted: what was planned.

        Returns:
            The groups and their sizes.

        Raises:
            UsageError: where nothing can be chosen.
        """

    def as_stored(self, checkpoint: Checkpoint, group: Choosable, width: Width, linear: ScaledLinear) -> torch.Tensor:
        """Stores a linear's weight at a width and reads it back, where the format rounds itself.

        Args:
            checkpoint: the source.
            group: one of `choice`.
            width: one of the group's.
            linear: one of the group's.

        Returns:
            float32 [O, I].
        """
        raise NotImplementedError


class Format(ABC):
    """A way to store a model, with everything that is said of it elsewhere."""

    name: str
    """What `--to` calls it, up to a colon."""
    help: str
    """What the command line says of it."""
    has_types = False
    """Whether a type follows its name, behind a colon."""
    needs_texts = True
    """Whether it cannot do without calibration."""
    encoded_by_package = False
    """Whether the package that decodes an output is needed to write it, since that rounds the weights."""
    keeps_mtp = True
    """Whether its engines take multi-token-prediction layers."""
    decoder: tuple[str, str] | None = None
    """The package that decodes an output, and the module; None where none is needed."""
    placement: Literal["parallel", "split"] | None
    """How `plan` places an output: every GPU holds its part of all layers (vLLM, SGLang); GPUs, RAM and disk share the
    layers (llama.cpp); None: its engines run on machines that `plan` does not know."""

    def default_symmetric(self, mixture: bool) -> bool | None:
        """Says whether its engines want no zero points.

        Args:
            mixture: whether the model has routed experts.

        Returns:
            True, false, or None where there is no choice.
        """
        return None

    def stored_type(self, type_name: str) -> str | None:
        """Returns ggml's type of most tensors of an output; None where codes are no ggml types."""
        return None

    def engine_notes(self, widths: Collection[Width], mixture: bool, to_choose: bool) -> list[str]:
        """Says what the engines of today do not read of an output.

        Args:
            widths: of its linears.
            mixture: whether the model has routed experts.
            to_choose: whether a target chooses among these widths.

        Returns:
            Sentences without a full stop.
        """
        return []

    def mixed_notes(self, widths: Collection[Width], mixture: bool) -> list[str]:
        """Says the same of an output whose linears have got several widths."""
        return []

    @abstractmethod
    def serve_command(self, location: Path | str) -> str:
        """Returns the command that serves the output at a location."""

    @abstractmethod
    def plan(self, wanted: Wanted) -> Target:
        """Plans an output, to the byte.

        Args:
            wanted: the recipe and the source.

        Returns:
            The plan.

        Raises:
            InputError: where the format has no place for a parameter.
            UsageError: where it cannot store what the recipe asks for.
        """
