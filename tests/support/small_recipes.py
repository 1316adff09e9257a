"""Small recipes for `dsquant run`, and what their runs write."""

from pathlib import Path
from typing import Any

import yaml

from dsquant.releases.recipe import ReleaseRecipe


def content(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> dict[str, Any]:
    recipe = {
        "model": str(nano_r1),
        "output": str(output),
        "calibration": {"texts": [str(text_file)], "samples": 4, "seq_len": 32},
        "quantize": [
            {"name": "awq", "to": ["awq", "compressed-tensors"], "steps": "none", "group_size": 64},
            {"name": "q4", "type": "Q8_0", "calibrate": False},
        ],
        "evaluate": {"texts": [str(text_file)], "samples": 1, "seq_len": 32},
    }
    return recipe | changes


def recipe_of(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> ReleaseRecipe:
    return ReleaseRecipe.model_validate(content(nano_r1, text_file, output, **changes))


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(nano_r1: Path, text_file: Path, output: Path, **changes: Any) -> ReleaseRecipe:
    step = {"name": "q", "type": "Q8_0", "calibrate": False}
    return recipe_of(nano_r1, text_file, output, **{"quantize": [step], "evaluate": None, **changes})
