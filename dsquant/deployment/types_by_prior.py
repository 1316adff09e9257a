"""Plans the types of a GGUF file for a size before a weight is read: by a prior, where a job measures.

An error costs a part's weight times a type's error, as on a small model, whose parts and types the job's own pass has
measured (tiny-r1 without outliers, twelve types, 16 x 256 tokens; docs/decisions/0028). Of R1 itself it takes what
others have measured in days: every tensor alone at 1.75 bits (Thireus' GGUF-Tool-Suite, R1-0528 by perplexity and
V3.1-Terminus by KL).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from dsquant.deployment.sizes import NOWHERE
from dsquant.deployment.subject import Subject
from dsquant.formats.gguf.target import choose_tensors, loadable_shapes
from dsquant.formats.gguf.type_choice import type_choice
from dsquant.formats.wanted import Choosable, Wanted
from dsquant.pipeline.planning import plan_units
from dsquant.precision.groups import plan_mixed, width_rows
from dsquant.precision.sensitivity import choose
from dsquant.recipes import Recipe, gguf_recipe

# Squared errors of types over that of Q4_K: medians over the small model's tensors.
TYPE_ERRORS = {
    "IQ1_S": 50.0, "IQ1_M": 40.0, "IQ2_XXS": 25.0, "IQ2_XS": 17.0, "IQ2_S": 12.0, "Q2_K": 15.0, "IQ3_XXS": 6.5,
    "IQ3_S": 3.9, "Q3_K": 4.4, "IQ4_XS": 1.14, "IQ4_NL": 1.1, "Q4_0": 1.4, "Q4_K": 1.0, "Q5_0": 0.34, "Q5_1": 0.24,
    "Q5_K": 0.25, "Q6_K": 0.061, "Q8_0": 0.0059,
}  # fmt: skip
# KL divergence of each part of a layer at one type, as shares of a layer's. At equal types attention and shared experts
# make 0.63 of it; on R1-0528 itself they made 0.65 of the squared error of probabilities (ik_llama.cpp, 477).
PARTS = {
    "attn_q_a": 0.026, "attn_q_b": 0.021, "attn_q": 0.026, "attn_kv_a_mqa": 0.22, "attn_k_b": 0.01, "attn_v_b": 0.10,
    "attn_k": 0.02, "attn_v": 0.10, "attn_output": 0.11, "ffn_gate_shexp": 0.046, "ffn_up_shexp": 0.036,
    "ffn_down_shexp": 0.056, "ffn_gate_exps": 0.14, "ffn_up_exps": 0.10, "ffn_down_exps": 0.13, "ffn_gate": 0.18,
    "ffn_up": 0.12, "ffn_down": 0.25,
}  # fmt: skip
# Measured on R1 and V3.1, in means of the routed experts' tensors: the head, the embedding, and in the last layer the
# shared expert's tensors; and the routed experts by depth (weakest in the first tenth, strongest from 0.57 to 0.9).
OF_AN_EXPERT_TENSOR = {"output": 44.0, "token_embd": 6.6}
LAST_SHARED_EXPERT = 6.5
EXPERTS_BY_DEPTH = ((0.12, 0.6), (0.57, 0.9), (0.9, 1.4), (1.0, 1.0))
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")


@dataclass(frozen=True)
class TypePlan:
    """The types of a GGUF file of a size."""

    target_bytes: int
    num_bytes: int
    """Of the tensors."""
    rows: tuple[tuple[str, ...], ...]
    """Group, type, layers, size, share of the error (`precision.groups.WIDTH_COLUMNS`)."""
    error: float
    """Over that of the same tensors at Q4_K."""


def types_for(subject: Subject, target_bytes: int) -> TypePlan:
    """Plans the types; raises UsageError where none meet the size."""
    recipe = gguf_recipe(model=subject.model, output=NOWHERE, target_size=target_bytes)
    wanted = _wanted(subject, recipe)
    names = [name for parameters in wanted.parameters.values() for name in parameters]
    shapes = loadable_shapes(subject.checkpoint, names)
    tensors, _ = choose_tensors(subject.skeleton.config, shapes, "Q4_K_M", 0, True)
    mixed = plan_mixed(recipe, type_choice(tensors, wanted))
    num_layers = subject.skeleton.num_layers
    found = choose(mixed, {group.name: prior(group, num_layers) for group in mixed.groups})
    entries = {name: _entry(found[name]) for name in found}
    weights = sum(weight_of(name, num_layers) for name in found)
    return TypePlan(
        target_bytes,
        mixed.other_bytes + sum(entry["bytes"] for entry in entries.values()),
        tuple(width_rows(entries)),
        sum(entry["error"] for entry in entries.values()) / weights,
    )


def _wanted(subject: Subject, recipe: Recipe) -> Wanted:
    units = plan_units("drop", subject.checkpoint, subject.skeleton)
    return Wanted(
        recipe=recipe,
        name=recipe.to[0],
        folder=PurePosixPath("."),
        checkpoint=subject.checkpoint,
        skeleton=subject.skeleton,
        parameters={unit.name: unit.parameters for unit in units if unit.action != "drop"},
        layers=subject.skeleton.layers[: subject.skeleton.num_layers],
        linears=frozenset(),
        dtypes={},
    )


def _entry(found: Mapping[str, Any]) -> dict[str, Any]:
    width = found["width"]
    return {"width": width, "bytes": found["bytes"][width], "error": found["errors"][width]}


def prior(group: Choosable, num_layers: int) -> dict[str, float]:
    """Returns what each type of a tensor costs, in shares of a layer's error at Q4_K."""
    weight = weight_of(group.name, num_layers)
    return {name: weight * TYPE_ERRORS[name] for name in group.num_bytes}


def weight_of(tensor: str, num_layers: int) -> float:
    """Returns the weight of a tensor of GGUF."""
    match = _TENSOR.fullmatch(tensor)
    assert match is not None, tensor
    expert = _mean(share for part, share in PARTS.items() if part.endswith("_exps"))
    if match[1] is None:
        return OF_AN_EXPERT_TENSOR[match[2]] * expert
    layer, part = int(match[1]), match[2]
    if part.endswith("_shexp") and layer == num_layers - 1:
        return max(PARTS[part], LAST_SHARED_EXPERT * expert)
    depth = (layer + 1) / num_layers
    factor = next(factor for end, factor in EXPERTS_BY_DEPTH if depth <= end) if part.endswith("_exps") else 1.0
    return factor * PARTS[part]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
