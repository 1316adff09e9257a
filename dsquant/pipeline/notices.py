"""Notes for the user of a job: before it begins, and once it is done."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from dsquant.escaping import counted
from dsquant.formats.protocol import Target
from dsquant.formats.table import SAFETENSORS, format_of
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.options import format_size
from dsquant.pipeline.inputs import Source
from dsquant.pipeline.run_state import Run
from dsquant.precision.sensitivity import SENSITIVITY
from dsquant.quantization.mlp_inputs import FEWEST_TOKENS
from dsquant.recipes import Recipe
from dsquant.schemes import FP8_WIDTH
from dsquant.source.vocabulary import surplus_notes

# The errors of a layer's parts, and the share of an output's energy beyond which one is told of.
LAYER_ERRORS = ("attention_error", "mlp_error")
MOST_LOST = 0.25
# The share of a target's bytes below which one is told that it was not used up.
MOST_UNUSED = 0.97


def planned_warnings(recipe: Recipe, source: Source) -> list[str]:
    """Lists what a user should know before a quantization begins, as sentences without a full stop."""
    words = [*source.checkpoint.notes, *source.notes]
    if source.tokenizer is not None:  # under recorded scales no text is read
        words += surplus_notes(source.tokenizer)
    if source.calibration is not None and source.calibration["samples"] < recipe.samples:
        words.append(
            f"the calibration texts yield {source.calibration['samples']} samples of {recipe.seq_len} tokens, "
            f"{recipe.samples} were asked for"
        )
    for target in source.plan.targets:
        mixed = source.plan.mixed.get(str(target.folder))
        widths = (recipe.bits,) if mixed is None else mixed.widths
        known, symmetric = format_of(target.name), target.grid.symmetric
        words += known.engine_notes(widths, _is_mixture(source), mixed is not None, symmetric)
        if recipe.activations in known.activations:
            words += known.activation_notes(recipe.activations, _is_mixture(source), bool(target.in_blocks))
    words += _notes_of_targets(source.plan.targets)
    if source.skeleton.num_mtp_layers and recipe.mtp == "drop":
        words.append("the multi-token-prediction layer is dropped: engines cannot draft with it any more")
    return words


def _notes_of_targets(targets: Sequence[Target]) -> Iterator[str]:
    """Yields what formats note; where not all of several do, the format's name stands before it."""
    notes = dict.fromkeys(note for target in targets for note in target.notes)
    for note in notes:
        noting = [target.name for target in targets if note in target.notes]
        yield note if len(noting) == len(targets) else f"{', '.join(noting)}: {note}"


def _is_mixture(source: Source) -> bool:
    return any(layer.experts for layer in source.skeleton.layers)


def run_warnings(run: Run, layers: list[dict[str, Any]]) -> list[str]:
    """Lists what a user should know of a finished run, from its layers' reports, as sentences without a full stop."""
    words = planned_warnings(run.recipe, run.source)
    counts = [count for layer in layers for count in layer["tokens_per_expert"]]
    topped_up = sum(len(layer["topped_up"]) for layer in layers)
    rare = topped_up if topped_up or "top-up" in run.recipe.steps else sum(count < FEWEST_TOKENS for count in counts)
    if rare and (run.recipe.steps or topped_up):  # plain rounding judges by no token
        on = "tokens that the router scores next highest for them were added" if topped_up else "none were added"
        words.append(
            f"{rare} of {len(counts)} experts got fewer than {FEWEST_TOKENS} calibration tokens; {on}; more --samples "
            "help"
        )
    for target in run.source.plan.targets:
        widths = {*target.widths.values(), *((FP8_WIDTH,) if run.recipe.target and target.in_blocks else ())}
        if len(widths) > 1:
            words += format_of(target.name).mixed_notes(widths, _is_mixture(run.source))
    grids = [grid for layer in layers for grid in layer.get("grids", [])]
    lost = sum(any((grid[key] or 0) > MOST_LOST for key in LAYER_ERRORS) for grid in grids)
    if lost:
        words.append(
            f"{lost} layers lost more than {MOST_LOST:.0%} of their output's energy (`layers` in {RECORD_FILE}): their "
            "weights or inputs are out of the range that these groups can hold; do not use the output unmeasured"
        )
    words += _unused(run)
    fallbacks = sum(len(grid["fallbacks"]) for grid in grids)
    if fallbacks:
        words.append(f"{counted(fallbacks, 'module')} rounded plainly, because the search found nothing better")
    return words


def _unused(run: Run) -> Iterator[str]:
    """Yields notes on targets whose bytes could not be used."""
    for target in run.source.plan.targets:
        folder = str(target.folder)
        groups = run.job.notes.get(SENSITIVITY, {}).get(folder, {})
        if not groups:
            continue
        used = sum(entry["bytes"][str(entry["width"])] for entry in groups.values())
        budget = run.source.plan.mixed[folder].budget_bytes
        if used < MOST_UNUSED * budget:
            more, sizes = _wider(target.name), f"{format_size(used)} of {format_size(budget)}"
            yield (
                f"{run.recipe.target}: what is chosen takes {sizes}, no group of linears fits into what is left{more}"
            )


def _wider(name: str) -> str:
    """Names a format whose linears may have more bits."""
    if name not in SAFETENSORS:
        return ""
    most = max(SAFETENSORS[name].bits)
    wider = (known for known in SAFETENSORS.values() if max(known.bits) > most)
    return "".join(f"; --to {known.name} has {max(known.bits)} bits as well" for known in islice(wider, 1))
