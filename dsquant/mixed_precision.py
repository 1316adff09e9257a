"""Chooses a width for every group of tensors, so that an output meets a target for its size with the least error.

One pass over the original, on a few samples, measures every group at every width (`quantization/sensitivity.py`); then
`allocation.py` divides the bytes. What came of it is noted in the job's record before any unit is made, and kept on
resume; a pass that was interrupted begins anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dsquant.allocation import Choice, allocate
from dsquant.conversion import Run
from dsquant.mixed_plan import MixedPlan
from dsquant.model.activations import Activations
from dsquant.model.streaming import embed
from dsquant.model.structure import DecoderLayer
from dsquant.planning import plan_run
from dsquant.preparation import Source
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.sensitivity import Sensitivity, measure_layer

# Sensitivities are measured on at most this many samples.
SAMPLES = 16
# Under this the job notes what was found.
SENSITIVITY = "sensitivity"


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
    found = run.job.notes.get(SENSITIVITY) or _measured(run, mixed)
    widths = {linear: int(entry["width"]) for group, entry in found.items() for linear in _linears(mixed, group)}
    plan = plan_run(run.recipe, source.checkpoint, source.skeleton, gpu_budget_bytes, run.ranks.size, widths)
    run.source = replace(source, plan=plan)
    if SENSITIVITY not in run.job.notes:
        run.job.note(**{SENSITIVITY: found, "files": output_files(run.source)})


def _linears(mixed: MixedPlan, name: str) -> tuple[str, ...]:
    return next(group.linears for group in mixed.groups if group.name == name)


def _measured(run: Run, mixed: MixedPlan) -> dict[str, dict[str, Any]]:
    """Group -> its width, and bytes and error of every width."""
    errors = _sensitivities(run, mixed)
    choices = [Choice(group.name, group.num_bytes, errors[group.name]) for group in mixed.groups]
    widths = allocate(choices, mixed.budget_bytes)
    return {
        choice.name: {
            "width": widths[choice.name],
            "bytes": {str(width): size for width, size in choice.num_bytes.items()},
            "errors": {str(width): error for width, error in choice.errors.items()},
        }
        for choice in choices
    }


def _sensitivities(run: Run, mixed: MixedPlan) -> Mapping[str, Mapping[int, float]]:
    source, skeleton = run.source, run.source.skeleton
    tokens_NT = source.tokens_NT[:SAMPLES]
    shape = (*tokens_NT.shape, int(skeleton.config["hidden_size"]))
    files = [run.job.work / f"sensitivity-{name}.f32" for name in ("inputs", "outputs", "mlp-inputs")]
    inputs, outputs, mlp_inputs = (Activations.in_file(path, shape, run.device) for path in files)
    embed(skeleton, source.checkpoint.weights, tokens_NT, inputs)
    found: dict[str, dict[int, float]] = {}
    layers = skeleton.layers[: skeleton.num_layers]
    for number, layer in enumerate(layers):

        def safe_point(what: str, number: int = number) -> None:
            run.safe_point("sensitivity", number, len(layers), what)

        safe_point(layer.prefix)
        measured = _measure(run, mixed, layer, (inputs, outputs, mlp_inputs), safe_point)
        found |= measured.errors
        inputs, outputs = outputs, inputs
    run.safe_point("sensitivity", len(layers), len(layers), "")
    del inputs, outputs, mlp_inputs
    for path in files:
        path.unlink()
    return found


def _measure(
    run: Run,
    mixed: MixedPlan,
    layer: DecoderLayer,
    passing: tuple[Activations, Activations, Activations],
    safe_point: Callable[[str], None],
) -> Sensitivity:
    source = run.source
    inputs, outputs, mlp_inputs = passing
    job = LayerJob(
        skeleton=source.skeleton,
        layer=layer,
        weights=source.checkpoint.weights,
        inputs=inputs,
        outputs=outputs,
        mlp_inputs=mlp_inputs,
        linears=source.plan.linears_of(layer),
        batch_samples=run.batch_samples,
        seed=run.recipe.seed,
        emit=lambda grid, name, value: None,
        safe_point=safe_point,
        steps=run.recipe.steps,
    )
    groups = {group.name: group.linears for group in mixed.groups if group.layer == layer.index}
    return measure_layer(job, groups, mixed.widths)
