"""Chooses a GGUF type for every tensor of the decoder, so that the files meet a target with the least error.

What came of the pass before it is noted in the job's record before any unit is made, and kept on resume.

Shape legend: M matrices of a tensor, O out features, I in features.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from dsquant.formats.gguf.imatrix import TensorImportance, column_importance
from dsquant.formats.gguf.layout import Placement, decode_rotary, encode, join_keys_and_values
from dsquant.formats.gguf.store import decoded_rows, stored_rows
from dsquant.formats.gguf.target import places_of
from dsquant.model.structure import DecoderLayer
from dsquant.pipeline.gguf_units import GgufPlan, GgufRun, gguf_target
from dsquant.pipeline.plan import GGUF_GRID
from dsquant.precision.groups import MixedPlan
from dsquant.precision.sensitivity import SENSITIVITY, SensitivityPass, choose
from dsquant.quantization.layer import KEYS_SUFFIX
from dsquant.quantization.statistics import Importance, InputMoments
from dsquant.recipes import PRESET_STEPS
from dsquant.schemes import Grid


def choose_types(run: GgufRun, output_files: Callable[[GgufPlan], list[str]]) -> None:
    """Plans the files anew, with a type for every tensor, where the recipe has a target; else does nothing.

    Args:
        run: the running job, before its files are open.
        output_files: every file that a plan makes, for the job's record.

    Raises:
        InputError: where the original's hidden states are not finite.
        Interrupted: at a safe point, where the job has to stop.
    """
    mixed, plan = run.plan.mixed, run.plan
    if mixed is None:
        return
    found = run.job.notes.get(SENSITIVITY) or choose(_pass(run, mixed))
    types = {name: str(entry["width"]) for name, entry in found.items()}
    run.plan = replace(plan, target=gguf_target(run.recipe, plan.checkpoint, plan.skeleton, plan.units, types))
    if SENSITIVITY not in run.job.notes:
        run.job.note(**{SENSITIVITY: found, "files": output_files(run.plan)})


def _pass(run: GgufRun, mixed: MixedPlan[str]) -> SensitivityPass[str]:
    """Weights are stored by their importance, under the scales that will be folded in."""
    plan, keys = run.plan, dict[str, Importance]()
    assert plan.tokens_NT is not None

    def linears_of(layer: DecoderLayer) -> Mapping[Grid, frozenset[str]]:
        return {GGUF_GRID: frozenset(layer.linears)}

    def note(_: Grid, linear: str, importance: Importance) -> None:
        if linear.endswith(KEYS_SUFFIX):
            keys[linear] = importance

    def store(tensor: str, type_name: str, linear: str, weight_OI: torch.Tensor, moments: InputMoments) -> torch.Tensor:
        parameter = f"{linear}.weight"
        placement = next(place for place in places_of(plan.checkpoint, parameter) if place.tensor == tensor)
        importance = keys[linear + KEYS_SUFFIX] if placement.transform == "keys" else moments.importance
        return _as_stored(weight_OI, parameter, placement, type_name, importance, plan)

    return SensitivityPass(
        mixed,
        plan.skeleton,
        plan.checkpoint.weights,
        plan.tokens_NT,
        linears_of,
        store,
        PRESET_STEPS["compact"] if plan.linears else (),
        run.job.work,
        run.batch_samples,
        run.recipe.seed,
        run.safe_point,
        note,
    )


def _as_stored(
    weight_OI: torch.Tensor,
    parameter: str,
    placement: Placement,
    type_name: str,
    importance: Importance,
    plan: GgufPlan,
) -> torch.Tensor:
    """A parameter's values [O, I] once one of the tensors that it fills is stored."""
    config = plan.skeleton.config
    matrices = encode(weight_OI, parameter, placement.transform, config)
    if matrices.dim() == 2:
        matrices = matrices.unsqueeze(0)
    sums_MI = importance.squares_I.cpu().expand(len(matrices), -1)
    columns_MI = column_importance(TensorImportance(sums_MI, torch.full((len(matrices),), float(importance.count))))
    rounded = torch.stack(
        [
            decoded_rows(stored_rows(matrix, type_name, columns_I), type_name).to(weight_OI.device)
            for matrix, columns_I in zip(matrices, columns_MI, strict=True)
        ]
    )
    if placement.transform == "keys":
        return join_keys_and_values(rounded, encode(weight_OI, parameter, "values", config))
    if placement.transform == "values":
        return join_keys_and_values(encode(weight_OI, parameter, "keys", config), rounded)
    return decode_rotary(rounded[0], parameter, config) if placement.transform == "rotary" else rounded[0]
