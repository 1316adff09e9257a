"""Files of units in the work folder for the job's end: folded scales, and tensors that formats ask to keep."""

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
    """Writes tensors (output folder -> name -> tensor) to a file in the work folder; no file without tensors."""
    flat = {f"{folder}:{name}": kept for folder, tensors in found.items() for name, kept in tensors.items()}
    if flat:
        write_atomically(path, save(flat))


def kept_of(paths: Iterable[Path], folder: str) -> Iterable[dict[str, torch.Tensor]]:
    """Yields an output folder's tensors in each file by name, names in order; a missing file holds nothing."""
    for path in paths:
        flat = load_file(path) if path.is_file() else {}
        names = sorted(name for name in flat if name.startswith(f"{folder}:"))
        yield {name.partition(":")[2]: flat[name] for name in names}
