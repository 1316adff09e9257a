"""Describes a checkpoint from its headers alone."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dsquant.errors import InputError
from dsquant.escaping import counted
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.complete import check_complete
from dsquant.model.kinds import kind_of
from dsquant.model.skeleton import Skeleton
from dsquant.options import format_size
from dsquant.reporting.notebook import as_html
from dsquant.source.checkpoint import CONFIG_FILE
from dsquant.source.locate import locate

IMATRIX_FILE = "imatrix.gguf"


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers."""

    folder: str
    architecture: str
    layers: int
    mtp_layers: int
    experts: int
    """Routed experts of a layer; 0 for a dense model."""
    parameters: int
    """Weights, packed ones with their unpacked number; without scales and zero points."""
    bytes_by_kind: dict[str, int]
    """Kinds of `dsquant.model.kinds`, the largest first."""
    dtypes: dict[str, int]
    """Stored dtype -> bytes."""
    notes: tuple[str, ...]
    """Differences between the files and config.json."""

    def __str__(self) -> str:
        total = sum(self.bytes_by_kind.values())
        dtypes = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in self.dtypes.items())
        counts = [counted(self.layers, "layer")]
        if self.experts:
            counts += [f"{self.experts} routed experts a layer", counted(self.mtp_layers, "MTP layer")]
        lines = [
            f"{self.folder}: {self.architecture}, {', '.join(counts)}",
            f"{self.parameters:,} parameters in {format_size(total)}: {dtypes}",
        ]
        lines += [
            f"  {kind:20} {format_size(size):>12} {size / total:7.2%}" for kind, size in self.bytes_by_kind.items()
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return as_html([str(self)])


def _check_one_checkpoint(folder: Path) -> None:
    """Refuses a folder of several outputs, or of GGUF files, with advice what to name instead."""
    if (folder / CONFIG_FILE).exists():
        return
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}"))
    if inside:
        raise InputError(f"{folder} holds several checkpoints; inspect one of {', '.join(inside)}")
    files = sorted(str(path) for path in folder.glob("*.gguf") if path.name != IMATRIX_FILE)
    if files:
        raise InputError(
            f"{folder} holds GGUF ({files[0]}), which inspect does not describe; `dsquant verify {folder}` checks it, "
            "`dsquant eval` measures it"
        )


def describe(model: str) -> Inspection:
    """Describes a checkpoint (a folder, a hub id, or `tiny-r1`); raises InputError where it cannot be read."""
    folder = locate(model)
    _check_one_checkpoint(folder)
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    check_complete(checkpoint, skeleton)
    sizes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    parameters = sum(math.prod(checkpoint.weights.shape(name)) for name in checkpoint.weights)
    for name, info in checkpoint.index.items():
        sizes[kind_of(name, skeleton.num_layers)] += info.num_bytes
        dtypes[info.dtype] += info.num_bytes
    return Inspection(
        folder=str(checkpoint.folder),
        architecture=checkpoint.architecture,
        layers=skeleton.num_layers,
        mtp_layers=skeleton.num_mtp_layers,
        experts=max(len(layer.experts) for layer in skeleton.layers),
        parameters=parameters,
        bytes_by_kind=dict(sizes.most_common()),
        dtypes=dict(dtypes.most_common()),
        notes=checkpoint.notes,
    )
