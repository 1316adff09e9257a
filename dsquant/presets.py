"""The presets, and the steps of a quantization that each takes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Preset = Literal["quality", "compact", "best"]
Activations = Literal["fp8", "int8", "fp4"]
"""What engines are told to round the inputs of quantized linears to."""
Rest = Literal["fp8", "bf16"]
"""How linears that are not quantized are stored: in the model's own FP8 blocks, or as BF16."""
Step = Literal["scales", "clip", "compensate", "top-up", "gate-weights", "follow", "descend", "predictions"]
"""A step of the quantization. `scales`: AWQ's scales are searched and folded in. `clip`: each group's range is clipped
to what costs least. `compensate`: later columns compensate earlier rounding errors (GPTQ). `top-up`: experts with few
tokens get those that the router scores highest for them. `gate-weights`: a token counts in an expert's statistics by
its squared share in the mixture. `follow`: statistics of the quantized model's inputs, aiming at the original's
outputs, or at its hidden states. `descend`: coordinate descent on scales, zero points and codes. `predictions`: rows
that are rounded later compensate what the errors of earlier ones do to the model's predictions; needs `follow`."""
STEPS: tuple[Step, ...] = get_args(Step)

_COMPACT: tuple[Step, ...] = ("scales", "clip", "compensate", "top-up")
PRESET_STEPS: Mapping[Preset, tuple[Step, ...]] = {
    "quality": _COMPACT,
    "compact": _COMPACT,
    "best": (*_COMPACT, "follow", "descend"),
}
# `best` of models up to this hidden size takes `predictions` too: in wider ones it has not been measured (decision 49).
WIDEST_FOR_PREDICTIONS = 1024


def default_steps(preset: Preset, hidden_size: Any) -> tuple[Step, ...]:
    """Returns the steps of a preset for a model of this hidden size, as its config.json gives it."""
    own = PRESET_STEPS[preset]
    narrow = isinstance(hidden_size, int) and hidden_size <= WIDEST_FOR_PREDICTIONS
    return (*own, "predictions") if preset == "best" and narrow else own


def listed_steps(steps: Any) -> list[Any]:
    """Reads steps given as a list, as names with commas, or as `none`."""
    if isinstance(steps, str):
        steps = [name.strip() for name in steps.split(",")]
    if not isinstance(steps, list | tuple | set | frozenset):
        raise ValueError(f"{steps!r:.80} is not a list of steps: give some of {', '.join(STEPS)}, or none alone")
    if list(steps) == ["none"]:
        return []
    unknown = [repr(step) for step in steps if step not in STEPS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: give some of {', '.join(STEPS)}, or none alone")
    return list(steps)


def preset_and_steps(preset: Preset, steps: Sequence[Step]) -> str:
    """A preset for people, with the steps where they are not its own: best with predictions; compact, steps scales."""
    more = [step for step in steps if step not in PRESET_STEPS[preset]]
    if set(steps) - set(more) == set(PRESET_STEPS[preset]):
        return f"{preset} with {' and '.join(more)}" if more else preset
    return f"{preset}, steps {' and '.join(steps)}" if steps else f"{preset}, no steps"
