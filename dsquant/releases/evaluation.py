"""Compares everything a run has made with the original, and decides the gates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dsquant.errors import UsageError
from dsquant.jobs import write_atomically
from dsquant.releases.recipe import ReleaseRecipe
from dsquant.telemetry import Report

EVALUATION_FOLDER = "evaluation"
REPORT_FILE = "report.json"


def evaluate_outputs(recipe: ReleaseRecipe, folders: Mapping[str, Path], build: Path, report: Report) -> dict[str, Any]:
    """Compares every output with the original.

    Args:
        recipe: the recipe.
        folders: output -> its folder or GGUF file.
        build: the folder that is published in the end.
        report: gets the progress.

    Returns:
        Output -> text -> distance, as plain JSON values.
    """
    from dsquant import comparison

    assert recipe.evaluate is not None
    texts, seq_len, samples = list(recipe.evaluate.texts), recipe.evaluate.seq_len, recipe.evaluate.samples
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        evaluation = comparison.evaluate(recipe.model, str(folder), texts, seq_len, samples, report)
        found[name] = evaluation.as_json()["texts"]
    (build / EVALUATION_FOLDER).mkdir(exist_ok=True)
    write_atomically(build / EVALUATION_FOLDER / REPORT_FILE, (json.dumps(found, indent=2) + "\n").encode())
    return found


def gates_content(recipe: ReleaseRecipe) -> Any:
    """The gates as plain values, from the recipe or its file."""
    if isinstance(recipe.gates, Path):
        try:
            return yaml.safe_load(recipe.gates.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{recipe.gates}: the gates cannot be read: {' '.join(str(error).split())}") from error
    return recipe.gates


def check_gates(recipe: ReleaseRecipe, build: Path) -> dict[str, Any]:
    """Decides the gates."""
    raise UsageError("gates: not there yet")
