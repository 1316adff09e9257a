"""Chooses a width for every group of tensors, so that an output meets a target for its size with the least error.

What came of the pass before it is noted in the job's record before any unit is made, and kept on resume.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from dsquant.pipeline.inputs import Source
from dsquant.pipeline.plan import plan_run
from dsquant.pipeline.units import Run
from dsquant.precision.groups import MixedPlan
from dsquant.precision.sensitivity import SENSITIVITY, SensitivityPass, choose
from dsquant.quantization.statistics import InputMoments
from dsquant.quantization.steps import rounded_weight


def choose_widths(run: Run, output_files: Callable[[Source], list[str]], gpu_budget_bytes: int) -> None:
    """Plans the run anew, with a width for every linear, where its recipe has a target; else does nothing.

    Args:
        run: the running job, before any unit.
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
    widths = {linear: int(found[group.name]["width"]) for group in mixed.groups for linear in group.linears}
    plan = plan_run(run.recipe, source.checkpoint, source.skeleton, gpu_budget_bytes, run.ranks.size, widths)
    run.source = replace(source, plan=plan)
    if SENSITIVITY not in run.job.notes:
        run.job.note(**{SENSITIVITY: found, "files": output_files(run.source)})


def _pass(run: Run, mixed: MixedPlan[int]) -> SensitivityPass[int]:
    """Weights are rounded as the job will round them."""
    source = run.source
    (grid,) = source.plan.linears
    steps = run.recipe.steps

    def rounded(group: str, width: int, linear: str, weight_OI: torch.Tensor, moments: InputMoments) -> torch.Tensor:
        return rounded_weight(weight_OI, grid.with_bits(width), moments, steps).dequantize()

    return SensitivityPass(
        mixed,
        source.skeleton,
        source.checkpoint.weights,
        source.tokens_NT,
        source.plan.linears_of,
        rounded,
        steps,
        run.job.work,
        run.batch_samples,
        run.recipe.seed,
        run.safe_point,
    )
