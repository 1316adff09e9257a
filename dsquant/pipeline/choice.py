"""Chooses a width for every group of tensors, so that an output meets a target for its size with the least error.

What came of the pass before it is noted in the job's record before any unit is made, and kept on resume.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dsquant.formats.protocol import Target
from dsquant.model.structure import KEYS_SUFFIX, DecoderLayer
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.plan import plan_run
from dsquant.pipeline.units import Run
from dsquant.precision.groups import MixedPlan
from dsquant.precision.sensitivity import SENSITIVITY, SensitivityPass, choose
from dsquant.quantization.statistics import Importance, InputMoments
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid


def choose_widths(run: Run, output_files: Callable[[Source], list[str]], gpu_budget_bytes: int) -> None:
    """Plans the run anew, with a width for every group, where its recipe has a target; else does nothing.

    Args:
        run: the running job, before its outputs are open.
        output_files: every file that a source may become, for the job's record.
        gpu_budget_bytes: the most GPU memory.

    Raises:
        InputError: where the original's hidden states are not finite.
        Interrupted: at a safe point, where the job has to stop.
    """
    mixed, source = run.source.plan.mixed, run.source
    if mixed is None:
        return
    found = run.job.notes.get(SENSITIVITY) or choose(_pass(run, mixed))
    chosen = {name: entry["width"] for name, entry in found.items()}
    plan = plan_run(run.recipe, source.checkpoint, source.skeleton, gpu_budget_bytes, run.ranks.size, chosen)
    run.source = replace(source, plan=plan)
    if SENSITIVITY not in run.job.notes:
        run.job.note(**{SENSITIVITY: found, "files": output_files(run.source)})


def _pass(run: Run, mixed: MixedPlan) -> SensitivityPass[Any]:
    """Weights are rounded, or stored, as the job will do it."""
    source = run.source
    assert source.tokens_NT is not None
    (target,) = source.plan.targets
    store = _Rounded(run, target.grid) if target.grid.rounded else _Stored(run, target, mixed)

    def linears_of(layer: DecoderLayer) -> Mapping[Grid, frozenset[str]]:
        searched = source.plan.linears_of(layer)
        return searched or {target.grid: frozenset(layer.linears)}

    return SensitivityPass(
        mixed,
        source.skeleton,
        source.checkpoint.weights,
        source.tokens_NT,
        linears_of,
        store,
        run.recipe.steps if source.plan.linears else (),
        run.job.work,
        run.batch_samples,
        run.recipe.seed,
        run.safe_point,
        store.note,
    )


class _Rounded:
    """Rounds weights at a width, as the steps say."""

    def __init__(self, run: Run, grid: Grid) -> None:
        self._grid, self._steps = grid, run.recipe.steps

    def __call__(
        self, group: str, width: int, linear: str, weight_OI: torch.Tensor, moments: InputMoments
    ) -> torch.Tensor:
        return rounded_weight(weight_OI, self._grid.with_bits(width), moments, self._steps).dequantize()

    def note(self, grid: Grid, linear: str, importance: Importance) -> None:
        """Needs no importance."""


class _Stored:
    """Stores weights by their importance, under the scales that will be folded in."""

    def __init__(self, run: Run, target: Target, mixed: MixedPlan) -> None:
        self._checkpoint, self._target = run.source.checkpoint, target
        self._groups = {group.name: group for group in mixed.groups}
        self._keys: dict[str, tuple[torch.Tensor, int]] = {}

    def __call__(
        self, group: str, width: str, linear: str, weight_OI: torch.Tensor, moments: InputMoments
    ) -> torch.Tensor:
        known = self._keys | {linear: (moments.importance.squares_I, moments.importance.count)}
        return self._target.as_stored(self._checkpoint, self._groups[group], width, linear, weight_OI, known)

    def note(self, grid: Grid, linear: str, importance: Importance) -> None:
        """Keeps what is known of keys, which is not in an input's moments."""
        if linear.endswith(KEYS_SUFFIX):
            self._keys[linear] = (importance.squares_I, importance.count)
