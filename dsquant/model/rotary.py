"""Rotary position embeddings: what a config says about them, wherever it says it.

One place decides how large yarn makes queries and keys (its magnitude): calibration, evaluation and conversion follow.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# A config's fields that hold the numbers: transformers 5 writes the second, everybody before it the first.
ROPE_FIELDS = ("rope_scaling", "rope_parameters")
POSITIVE = (
    "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "attention_factor", "attn_factor",
)  # fmt: skip
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rotary:
    """The effect of positions on the scores of attention."""

    frequencies_F: torch.Tensor
    """float64 [rotated dimensions / 2], radians for each position."""
    magnitude: float
    """Factor on the rotated queries and keys."""
    score_scale: float
    """Factor on the scores."""

    def difference(self, other: "Rotary") -> str | None:
        """Says where another rotary embedding differs by more than rounding; None where it does not."""
        mine_F, other_F = self.frequencies_F, other.frequencies_F
        if len(mine_F) != len(other_F):
            return f"{2 * len(other_F)} rotated dimensions instead of {2 * len(mine_F)}"
        if not torch.allclose(mine_F, other_F, rtol=TOLERANCE, atol=0):
            place = int(((other_F - mine_F).abs() / mine_F).argmax())
            return f"frequency {place} {float(other_F[place]):.6g} instead of {float(mine_F[place]):.6g}"
        for name in ("magnitude", "score_scale"):
            mine, others = getattr(self, name), getattr(other, name)
            if not math.isclose(mine, others, rel_tol=TOLERANCE):
                return f"{name.replace('_', ' ')} {others:.6g} instead of {mine:.6g}"
        return None


def rope_problem(config: Mapping[str, Any]) -> str | None:
    """Returns the problem, in words, of a config.json's statements on rotary embeddings; None where there is none."""
    stated = {field: config[field] for field in ROPE_FIELDS if config.get(field)}
    for field, rope in stated.items():
        if not isinstance(rope, Mapping):
            return f"{field} is {rope!r:.80}, expected an object"
        for key in POSITIVE:
            value = rope.get(key, 1)
            optional = value is None and key not in ("factor", "rope_theta")
            if not optional and not (_is_number(value) and value > 0):
                return f"{field} has the {key} {value!r:.80}, expected a number above 0"
        if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
            return f"{field} has the type {rope['type']!r:.80} and the rope_type {rope['rope_type']!r:.80}"
    both = [_comparable(rope) for rope in stated.values()]
    if len(both) == 2 and both[0] != both[1]:
        return f"rope_scaling {stated['rope_scaling']} and rope_parameters {stated['rope_parameters']} differ"
    bases = {field: rope["rope_theta"] for field, rope in stated.items() if "rope_theta" in rope}
    if config.get("rope_theta") is not None:
        bases["the config itself"] = config["rope_theta"]
    if len(set(map(repr, map(_plain_number, bases.values())))) > 1:
        return f"rope_theta is stated more than once, differently: {bases}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain_number(value: Any) -> Any:
    return float(value) if _is_number(value) else value


def _comparable(rope: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    return named | {"type": rope.get("rope_type", rope.get("type", "default"))}


def settle_magnitude(hf_config: Any) -> None:
    """Brings every way to state yarn's magnitude into the one that transformers reads, `attention_factor`, in place.

    R1-0528-Qwen3-8B has `attn_factor`, which vLLM multiplies with what yarn infers from the factor, and which
    transformers ignores: without it queries and keys would be 1.139 times as large as they are meant to be.
    `apply_yarn_scaling: false` takes the inferred part away. Raises ValueError where the statements contradict each
    other, or nothing computes what they ask for.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = hf_config.rope_parameters
    multiplied, inferring = rope.pop("attn_factor", None), rope.pop("apply_yarn_scaling", None) is not False
    if rope.pop("extrapolation_factor", None) not in (None, 1):
        raise ValueError("rope scaling with an extrapolation_factor other than 1 is not supported")
    if multiplied in (None, 1) and inferring:
        return
    if rope.get("rope_type") != "yarn":
        raise ValueError(f"attn_factor and apply_yarn_scaling belong to yarn, found {rope}")
    stated = rope.pop("attention_factor", None)
    inferred = float(ROPE_INIT_FUNCTIONS["yarn"](hf_config)[1]) if inferring else 1.0
    magnitude = inferred * (1.0 if multiplied is None else float(multiplied))
    if stated is not None and not math.isclose(stated, magnitude, rel_tol=TOLERANCE):
        raise ValueError(
            f"yarn's attention_factor {stated} contradicts attn_factor {multiplied}, which makes it {magnitude:.6g}"
        )
    rope["attention_factor"] = magnitude


def head_width(hf_config: Any) -> int:
    """Returns the dimensions of a head that may be rotated."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def score_scale(hf_config: Any) -> float:
    """Returns the factor on the scores of attention that most architectures have."""
    return head_width(hf_config) ** -0.5


def rotary_of(hf_config: Any, scale: float) -> Rotary:
    """Returns what transformers' modules compute at positions within the trained context; the magnitude is settled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = hf_config.rope_parameters
    if rope["rope_type"] == "default":
        width = int(head_width(hf_config) * (rope.get("partial_rotary_factor") or 1))
        frequencies_F, magnitude = plain_frequencies(rope["rope_theta"], width), 1.0
    else:
        frequencies_F, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config)
    return Rotary(frequencies_F.double(), float(magnitude), scale)


def plain_frequencies(base: float, width: int) -> torch.Tensor:
    """Returns frequencies without scaling, float64 [width / 2]."""
    return float(base) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns yarn's magnitude for a factor, `get_mscale` of its authors."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
