"""Small jobs: their options, what they wrote, and new releases of their models."""

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Nothing is searched for: a test of what the steps do says which it takes, or None for those of its preset.
FAST: dict[str, Any] = {
    "samples": 6, "seq_len": 32, "group_size": 64, "steps": "none", "evaluate": False, "progress": False,
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    options = ["--samples", "6", "--seq-len", "32", "--group-size", "64", "--no-evaluate", "--json", *more]
    options += [] if "--to" in more else ["--to", "awq"]
    return ["awq", str(model), "--output", str(output), "--calibration", str(text), *options]


def changed_copy(source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> list[str]:
    """Copies a checkpoint; `change` returns new values of the tensors that are to change."""
    shutil.copytree(source, target)
    names = []
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            values = None if name.endswith("_scale_inv") else change(name, tensors[name].float())
            if values is not None:
                tensors[name] = values.to(tensors[name].dtype)
                names.append(name)
        save_file(tensors, file)
    return names


def noise(share: float, seed: int) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def change(name: str, values: torch.Tensor) -> torch.Tensor | None:
        if chance.random() >= share:
            return None
        return (values * (1 + 0.03 * torch.randn(values.shape, generator=generator))).clamp(-448, 448)

    return change
