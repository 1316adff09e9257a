"""What units lay into the work folder for the job's end: folded scales, and what formats ask to keep."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from dsquant.files.disk import write_atomically


def scales_file(unit: str) -> str:
    """The file of a unit's scales in the work folder."""
    return f"scales-{unit}.safetensors"


def kept_file(unit: str) -> str:
    """The file of what formats keep of a unit."""
    return f"kept-{unit}.safetensors"


def keep_by_folder(path: Path, found: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Lays tensors into the work folder; makes no file where there are none.

    Args:
        path: the file.
        found: output folder -> name -> tensor.
    """
    flat = {f"{folder}:{name}": kept for folder, tensors in found.items() for name, kept in tensors.items()}
    if flat:
        write_atomically(path, save(flat))


def kept_of(paths: Iterable[Path], folder: str) -> Iterable[dict[str, torch.Tensor]]:
    """Reads back what an output folder has in each of some files.

    Args:
        paths: the files; one that is not there holds nothing.
        folder: the output folder.

    Yields:
        Name -> tensor, names in order, of each file.
    """
    for path in paths:
        flat = load_file(path) if path.is_file() else {}
        names = sorted(name for name in flat if name.startswith(f"{folder}:"))
        yield {name.partition(":")[2]: flat[name] for name in names}
