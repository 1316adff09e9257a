"""The request that a format plans, and the choices that it leaves."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import DecoderLayer
from dsquant.recipes import Recipe
from dsquant.schemes import Fp8Blocks, Grid
from dsquant.source.checkpoint import Checkpoint

Width = int | str
"""Bits of a code; 16 for a linear that is not quantized, `FP8` for one in the source's blocks; or a type of GGUF."""
# Beside an output whose widths were chosen: a picture of them.
PICTURE_FILE = "choice.svg"
NO_CHOICE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Wanted:
    """A request to plan an output."""

    recipe: Recipe
    name: str
    """As `--to` has it."""
    folder: PurePosixPath
    """Inside the output folder; `.` where there is one format."""
    checkpoint: Checkpoint
    skeleton: Skeleton
    parameters: Mapping[str, tuple[str, ...]]
    """Unit -> its parameters, of all units that are made, in order."""
    layers: tuple[DecoderLayer, ...]
    """Those that are quantized."""
    linears: frozenset[str]
    """Those that the preset quantizes."""
    dtypes: Mapping[str, str]
    """Parameter -> safetensors dtype in which it is stored where it is not quantized."""
    fp8: Mapping[str, Fp8Blocks] = field(default_factory=dict)
    """Linear that has FP8 blocks in the source -> these, where the recipe keeps them; a format may hold them."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Group of linears or tensor (`Choosable`) -> the width that was chosen for it."""

    @property
    def mixture(self) -> bool:
        """Whether the network has routed experts."""
        return any(layer.experts for layer in self.skeleton.layers)

    @property
    def num_mtp_layers(self) -> int:
        """Multi-token-prediction layers of the output."""
        return 0 if self.recipe.mtp == "drop" else self.skeleton.num_mtp_layers


@dataclass(frozen=True)
class Choosable:
    """Linears of a layer, or a tensor of GGUF, that get one width."""

    name: str
    layer: int | None
    """None for embedding and head."""
    linears: tuple[str, ...]
    num_bytes: Mapping[Any, int]
    """Width -> stored bytes of all of them, with scales and zero points."""


@dataclass(frozen=True)
class Choice:
    """The widths that a target for bits or size can choose."""

    groups: tuple[Choosable, ...]
    elements: int
    """Weights over which the mean of the bits is taken."""
    other_bytes: int
    """Of all tensors that are in no group."""
    fixed_bytes: int
    """Of those in no group whose weights are among `elements`."""
    words: str
    """A description of the choice, for messages."""
    widths: tuple[Any, ...]
    preferred: Collection[Any] = ()
    """Widths that engines take; others are chosen only where a target cannot be met without them."""


@dataclass(frozen=True)
class Linears:
    """The decoder's linears, for a config.json."""

    quantized: Mapping[str, bool]
    """Every linear -> whether it is quantized."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Linear -> bits where widths were chosen, else all have the grid's."""
    mtp_layer: str = ""
    """The module of the multi-token-prediction layer, if any."""
    kept: Mapping[str, Fp8Blocks | Grid] = field(default_factory=dict)
    """Those that stay as the source has them, in FP8 blocks or in integers on a grid."""

    @property
    def taken(self) -> dict[str, bool]:
        """Every linear -> whether engines find it in few bits or in FP8."""
        return {linear: quantized or linear in self.kept for linear, quantized in self.quantized.items()}
