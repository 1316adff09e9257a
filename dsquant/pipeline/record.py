"""The record of a finished job: everything that dsquant.json says but the files and their hashes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsquant.formats.protocol import Target
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.packages import PACKAGES, version
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.notices import run_warnings
from dsquant.pipeline.run_state import Run
from dsquant.precision.sensitivity import SENSITIVITY
from dsquant.schemes import Scheme
from dsquant.source.license import read_license

# The record's layout. 1: first. 2: hashes of all files and of its own sections; errors of single weights.
RECORD_VERSION = 2


def output_files(source: Source) -> list[str]:
    """Every file that a job may make, relative to the output folder."""
    names = {RECORD_FILE}
    for target in source.plan.targets:
        names |= {str(target.folder / name) for name in (*target.file_names(), RECORD_FILE)}
    return sorted(names)


def run_record(run: Run, divergence: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns everything about an output that two runs have in common, so no times and memory; `divergence` is format
    -> text -> distance from the original."""
    source, journal = run.source, run.job.journal.units
    weights, targets = source.checkpoint.weights, source.plan.targets
    layers, errors = _layers(journal)
    license_ = read_license(source.checkpoint.folder, source.checkpoint.config)
    packages = dict.fromkeys([*PACKAGES, *(name for target in targets for name in target.packages)])
    return {
        "record_version": RECORD_VERSION,
        "recipe": run.recipe.lasting(),
        "recipe_sha256": run.recipe.hash,
        "versions": {name: version(name) for name in packages},
        **{name: value for target in targets for name, value in target.facts.items()},
        "source": {
            "architecture": source.checkpoint.architecture,
            "bytes": source.checkpoint.index.num_bytes,
            "bf16_bytes": 2 * sum(math.prod(weights.shape(name)) for name in weights),
            "tensors_sha256": run.job.notes["tensors"],
            **({"license": license_} if license_ else {}),
        },
        "calibration": source.calibration,
        "outputs": {
            target.name: target.recorded(_weight_errors(target, journal, errors, list(source.plan.linears)))
            for target in targets
        },
        "layers": layers,
        "divergence": divergence,
        "warnings": run_warnings(run, layers),
        **_precision(run),
    }


def _weight_errors(
    target: Target,
    journal: Mapping[str, Mapping[str, Any]],
    by_grid: Mapping[int, Mapping[str, float]],
    grids: Sequence[Scheme],
) -> Mapping[str, float]:
    """Those of an output's grid, by linear; by parameter those of what its format rounds itself."""
    own = by_grid.get(grids.index(target.grid), {})  # nothing, where a choice left every linear in BF16
    if target.grid.rounded:
        return own
    found = dict(own)
    for entry in journal.values():
        found |= entry["weight_errors"].get(str(target.folder), {})
    return found


def _precision(run: Run) -> dict[str, dict[str, Any]]:
    """Where widths were chosen: group -> the width, with its bytes and error, and the errors of all widths."""
    found = {
        target.name: {
            group: {
                "width": entry["width"],
                "bytes": entry["bytes"][str(entry["width"])],
                "error": entry["errors"][str(entry["width"])],
                "errors": entry["errors"],
            }
            for group, entry in run.job.notes[SENSITIVITY][str(target.folder)].items()
        }
        for target in run.source.plan.targets
        if SENSITIVITY in run.job.notes
    }
    if not found:
        return {}
    return {"precision": found if len(found) > 1 else next(iter(found.values()))}


def _layers(journal: Mapping[str, Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, dict[str, float]]]:
    """The layers' reports, and grid -> linear -> error, which is told by output and not by layer."""
    layers, errors = [], dict[int, dict[str, float]]()
    for entry in journal.values():
        if "layer" in entry:
            grids = entry["layer"].get("grids", [])
            layers.append({key: value for key, value in entry["layer"].items() if key != "grids"})
            if grids:
                layers[-1]["grids"] = [{k: v for k, v in grid.items() if k != "weight_errors"} for grid in grids]
            for number, grid in enumerate(grids):
                errors.setdefault(number, {}).update(grid["weight_errors"])
    return layers, errors
