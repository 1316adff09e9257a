"""How an output is planned, written unit by unit, and finished: all that the rest of dsquant knows of a format.

A `Format` plans a `Target`: everything about an output that headers tell. A running job opens it, and the `OpenTarget`
gives a `UnitWriter` for each unit of the job (embedding, layer, head).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import torch

from dsquant.files.hashing import FileHashes
from dsquant.formats.wanted import NO_CHOICE, Choice, Choosable, Wanted, Width
from dsquant.formats.write_behind import Sink, WriteBehind
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.presets import Activations
from dsquant.schemes import QuantizedWeight, Scheme
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.weights import Weights

# Of outputs whose engines round activations.
OF_WEIGHTS_ALONE = "the errors that dsquant tells are those of the weights"
Contents = dict[str, dict[str, Any]]
"""File in the output folder -> its entry in the record: `tensors`, each with its dtype or type, SHA-256, and shape; and
`metadata`, the format in a safetensors header where that is not `pt`."""


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
    """The parts of the running job that writing needs."""

    checkpoint: Checkpoint
    output: Path
    work: Path
    ranks: Ranks = ALONE
    write_behind: WriteBehind | None = None
    """Writes what comes from a GPU."""
    hashes: FileHashes | None = None
    """Hashes the output's files while they are written."""

    def hand_over(self, tensors: tuple[torch.Tensor, ...], *sinks: Sink) -> None:
        """Gives tensors, which nobody changes any more, to every sink in host memory: each sink has a thread, or all
        are done when this returns."""
        if self.write_behind is not None:
            self.write_behind.write(tensors, *sinks)
            return
        for sink in sinks:
            sink(*tensors)

    def written(self, path: Path, start: int, stop: int, name: str = "") -> None:
        """Tells that bytes start..stop-1 of a file are written; `name` is its last name, where that is another."""
        if self.hashes is not None:
            self.hashes.written(path, name or path.name, start, stop)

    def wait(self) -> None:
        """Returns when all that was handed over is done; raises the first error."""
        if self.write_behind is not None:
            self.write_behind.wait()

    def drop(self) -> None:
        """Gives up what was handed over and is not done."""
        if self.write_behind is not None:
            self.write_behind.drop()


class UnitWriter(ABC):
    """Writes one unit of one output."""

    def __init__(self) -> None:
        self.bytes_written = 0

    @abstractmethod
    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        """Writes a linear's quantized weight, or a parameter's float32 values."""

    def note(self, linear: str, squares: torch.Tensor, count: int) -> None:  # noqa: B027 - most formats need none
        """Notes how much each input column of a linear matters, before it is written: sums of squared inputs over
        `count` tokens, float32 [I]; [H, N] for kv_b_proj's keys alone, whose name ends in `KEYS_SUFFIX`."""

    def note_largest(self, linear: str, largest: torch.Tensor) -> None:  # noqa: B027 - most formats need none
        """Notes the largest magnitude among a linear's inputs, float32 []."""

    @abstractmethod
    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Writes the unit's unchanged parameters, in parts of bounded size."""

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
        """Tensors of the unit that `OpenTarget.finish` needs, for the work folder."""
        return {}


class OpenTarget(ABC):
    """An output that is being written."""

    @abstractmethod
    def unit(self, name: str, parameters: tuple[str, ...]) -> UnitWriter:
        """Begins a unit with these parameters."""

    @abstractmethod
    def finish(self, kept: Iterable[Mapping[str, torch.Tensor]], calibration: Mapping[str, Any] | None) -> None:
        """Completes the output; `kept` is each unit's `UnitWriter.kept`, in order, `calibration` describes the
        tokens."""

    def close(self) -> None:  # noqa: B027 - most hold nothing open
        """Closes what is open; what is on disk stays, for a resumed job."""


@dataclass(frozen=True)
class StoredFile:
    """A file of an interrupted job, as finished units have left it."""

    path: Path
    header: bytes
    num_bytes: int
    places: Mapping[str, tuple[int, int]]
    """Tensor of a finished unit -> where its data begin in the file, and their size."""


@dataclass(frozen=True)
class Target(ABC):
    """One output, planned from headers."""

    name: str
    """Its name in results and records."""
    folder: PurePosixPath
    """Inside the job's output folder."""
    grid: Scheme
    """The grid that scales are searched for."""
    linears: frozenset[str]
    """Those that are quantized onto the grid, or whose inputs are scaled for it."""
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """Sentences for the user."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages that the record names in addition to those of every job."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of all files with weights."""

    @property
    @abstractmethod
    def location(self) -> PurePosixPath:
        """The path for engines: the folder, or a file in it."""

    @property
    def storing_bytes(self) -> int:
        """Resident memory that storing a weight takes beyond the weight itself."""
        return 0

    @property
    def widths(self) -> Mapping[str, int]:
        """Quantized linear -> bits, where these were chosen; else all have the grid's."""
        return NO_CHOICE

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Linear -> the scheme that it is rounded to, where that is not the grid."""
        return {linear: self.grid.with_bits(bits) for linear, bits in self.widths.items()}

    @property
    def in_blocks(self) -> frozenset[str]:
        """The linears that stay in the source's FP8 blocks: only powers of two are folded into them without error."""
        return frozenset()

    @property
    def packed(self) -> frozenset[str]:
        """The linears that keep the source's own integers, byte for byte: nothing is folded into them."""
        return frozenset()

    @property
    def rounded(self) -> frozenset[str]:
        """The linears that the quantization rounds, and not the format."""
        schemes = self.schemes
        return frozenset(linear for linear in self.linears if schemes.get(linear, self.grid).rounded)

    @property
    def facts(self) -> Mapping[str, Any]:
        """How this output is made, for job and record; a resumed job must find the same."""
        return {}

    @property
    def bytes_by_file(self) -> dict[str, int]:
        """Sizes of its files for a preview; one sum where there are many."""
        return {self.name: self.num_bytes}

    @property
    def details(self) -> Mapping[str, str]:
        """Rows of a preview."""
        return {}

    @abstractmethod
    def file_names(self) -> list[str]:
        """Every file that may be written to its folder."""

    @abstractmethod
    def open(self, surroundings: Surroundings, resumed: bool) -> OpenTarget:
        """Opens the output for writing; `resumed` where finished units are there already.

        Raises InputError where an interrupted job's files are missing or not the planned ones.
        """

    @abstractmethod
    def finished_files(self, output: Path, units: Sequence[str], tensors: Collection[str]) -> Iterable[StoredFile]:
        """Lists the files in the job's output folder with the tensors of the finished units."""

    @abstractmethod
    def candidate(self, output: Path, checkpoint: Checkpoint) -> Weights:
        """Reads the finished output back from the job's folder, for the comparison with the original checkpoint."""

    @abstractmethod
    def contents(self, hashes: Mapping[str, str], output: Path) -> Contents:
        """Returns the record's entries for its files, from tensor -> SHA-256 and the job's output folder."""

    @abstractmethod
    def recorded(self, errors: Mapping[str, float]) -> dict[str, Any]:
        """Returns the record's entry as plain JSON values, `folder`, `bytes` and `weight_errors` among them; `errors`
        is linear or parameter -> the relative error of its weight."""

    @abstractmethod
    def choice(self, wanted: Wanted) -> Choice:
        """Lists the groups that get a width where the recipe has a target for bits or size, and their sizes; raises
        UsageError where there are none."""

    @property
    def choice_lines(self) -> Mapping[str, str]:
        """Files that tell chosen widths in the words of the format's tools: name -> content."""
        return {}

    def as_stored(self, checkpoint: Checkpoint, group: Choosable, width: Width, linear: ScaledLinear) -> torch.Tensor:
        """Stores a linear's weight at one of the widths of its group and reads it back, float32 [O, I], where the
        format rounds itself."""
        raise NotImplementedError


class Format(ABC):
    """A way to store a model, with everything that other stages ask about it."""

    name: str
    """Its name in `--to`, up to a colon."""
    help: str
    """Its description on the command line."""
    has_types = False
    """Whether a type follows its name, after a colon."""
    needs_texts = True
    """Whether it needs calibration."""
    encoded_by_package = False
    """Whether writing an output needs the package that decodes it, since that rounds the weights."""
    holds_fp8 = False
    """Whether linears that are not quantized may stay in FP8 blocks."""
    activations: tuple[Activations, ...] = ()
    """What engines can be told to round the inputs of quantized linears to."""
    keeps_mtp = True
    """Whether its engines take multi-token-prediction layers."""
    decoder: tuple[str, str] | None = None
    """The package that decodes an output, and the module; None where none is needed."""
    placement: Literal["parallel", "split", "unified"]
    """How `plan` places an output: every GPU holds its part of all layers (vLLM, SGLang); GPUs, RAM and disk share the
    layers (llama.cpp); in memory that processor and GPU share (mlx-lm)."""
    placed: tuple[str, ...] = ()
    """The types that `plan` places on machines, from the best quality to the worst."""
    on_disk: tuple[str, ...] = ()
    """Those of them to read from a disk, the best first: more bits only cost speed there."""
    for_trials: tuple[str, ...] = ()
    """Those of them whose answers differ visibly: `plan` prefers more bits in RAM to these in a GPU."""

    def default_symmetric(self, mixture: bool) -> bool | None:
        """Returns whether its engines want no zero points, for a model with routed experts or one without; None where
        there is no choice."""
        return None

    def stored_type(self, type_name: str) -> str | None:
        """Returns ggml's type of most tensors of an output; None where codes are not of ggml's types."""
        return None

    def engine_notes(
        self, widths: Collection[Width], mixture: bool, to_choose: bool, symmetric: bool = True
    ) -> list[str]:
        """Returns what current engines do not read of an output with linears of these widths, as sentences without a
        full stop; `to_choose` where a target chooses among the widths, `symmetric` without zero points."""
        return []

    def activation_notes(self, kind: Activations, mixture: bool, fp8: bool) -> list[str]:
        """Returns the same for an output whose engines round activations; `fp8` where linears stay in FP8 blocks."""
        return []

    def mixed_notes(self, widths: Collection[Width], mixture: bool) -> list[str]:
        """Returns the same for an output whose linears have several widths."""
        return []

    @abstractmethod
    def serve_command(self, location: Path | str) -> str:
        """Returns the command that serves the output at a location."""

    @abstractmethod
    def plan(self, wanted: Wanted) -> Target:
        """Plans an output, to the byte.

        Raises InputError where the format has no place for a parameter, UsageError where it cannot store what the
        recipe asks for.
        """
