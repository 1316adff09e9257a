"""Chooses a width for every group of tensors, so that each output meets a target for its size with the least error.

The measured sensitivities are noted in the job's record before any unit is made, and kept on resume.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dsquant.formats.protocol import ScaledLinear, Target
from dsquant.formats.wanted import Choosable
from dsquant.model.structure import KEYS_SUFFIX, DecoderLayer
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.planning import plan_run
from dsquant.pipeline.predictions import gradient_pass
from dsquant.pipeline.run_state import Run
from dsquant.precision.groups import MixedPlan
from dsquant.precision.layer_errors import Store, Trial
from dsquant.precision.sensitivity import SAMPLES, SENSITIVITY, SensitivityPass, choose, measured
from dsquant.quantization.statistics import Importance, InputMoments
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Scheme


def choose_widths(run: Run, output_files: Callable[[Source], list[str]], gpu_budget_bytes: int) -> None:
    """Plans the run again, with a width for every group of every output, where its recipe has a target.

    Called before outputs are open; `output_files` lists every file that a source may become, for the job's record.
    Raises InputError where the original's hidden states are not finite.
    """
    source = run.source
    if not source.plan.mixed:
        return
    noted = run.ranks.once(lambda: run.job.notes.get(SENSITIVITY))
    found = noted or _choices(run)
    chosen = {name: {group: entry["width"] for group, entry in groups.items()} for name, groups in found.items()}
    plan = plan_run(run.recipe, source.checkpoint, source.skeleton, gpu_budget_bytes, run.ranks.size, chosen)
    run.source = replace(source, plan=plan)
    if not noted:
        run.ranks.once(lambda: run.job.note(**{SENSITIVITY: found, "files": output_files(run.source)}))


def _choices(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Folder -> group -> its width with what was measured; weights are rounded, or stored, as the job will do it."""
    plan = run.source.plan
    keys: dict[str, tuple[torch.Tensor, int]] = {}

    def note(grid: Scheme, linear: str, importance: Importance) -> None:
        if linear.endswith(KEYS_SUFFIX):  # what is known of keys is not in an input's moments
            keys[linear] = (importance.squares_I, importance.count)

    trials = {}
    for grid in plan.linears:
        targets = [target for target in plan.targets if target.grid == grid]
        store = _rounded(run, grid) if grid.rounded else _stored(run, targets[0], keys)
        trials[grid] = Trial(_all_groups([plan.mixed[str(target.folder)] for target in targets]), store)

    def linears_of(layer: DecoderLayer) -> Mapping[Scheme, frozenset[str]]:
        return plan.linears_of(layer) if plan.quantizes else {grid: frozenset(layer.linears) for grid in plan.linears}

    steps = run.recipe.steps if plan.quantizes else ()
    errors = measured(SensitivityPass(trials, gradient_pass(run, SAMPLES), linears_of, steps, note, plan.in_blocks))
    return {str(target.folder): choose(plan.mixed[str(target.folder)], errors[target.grid]) for target in plan.targets}


def _all_groups(plans: Sequence[MixedPlan]) -> list[Choosable]:
    """The groups of outputs on one grid, each with the widths that any of the outputs may give it."""
    groups: dict[str, Choosable] = {}
    for group in (group for plan in plans for group in plan.groups):
        known = groups.get(group.name, group)
        groups[group.name] = replace(known, num_bytes={**known.num_bytes, **group.num_bytes})
    return list(groups.values())


def _rounded(run: Run, grid: Scheme) -> Store[Any]:
    """Rounds weights at a width, as the steps say."""

    def store(
        group: Choosable, width: int, linear: str, weight_OI: torch.Tensor, moments: InputMoments | None
    ) -> torch.Tensor:
        assert moments is not None  # embedding and head are never rounded
        return rounded_weight(weight_OI, grid.with_bits(width), moments, run.recipe.steps).dequantize()

    return store


def _stored(run: Run, target: Target, keys: Mapping[str, tuple[torch.Tensor, int]]) -> Store[Any]:
    """Stores weights by their importance, under the scales that will be folded in."""

    def store(
        group: Choosable, width: str, linear: str, weight_OI: torch.Tensor, moments: InputMoments | None
    ) -> torch.Tensor:
        own = {} if moments is None else {linear: (moments.importance.squares_I, moments.importance.count)}
        return target.as_stored(run.source.checkpoint, group, width, ScaledLinear(linear, weight_OI, {**keys, **own}))

    return store
