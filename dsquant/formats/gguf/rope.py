"""Rotary embeddings in GGUF: the keys that describe them, and what llama.cpp computes from such keys.

In these architectures llama.cpp does not read yarn's beta_fast and beta_slow, and takes 32 and 1 unless it is started
with others. It assumes whole-numbered bounds, reads frequency factors where an architecture has that kind of scaling,
and with latent attention derives the scale of the scores from yarn's magnitude. So a config is written as keys, the
keys are evaluated as llama.cpp does it, and a difference is refused.

Reference: src/llama-context.cpp (yarn_beta_fast, yarn_attn_factor), src/models/deepseek2.cpp (kq_scale) and ggml's
rope_yarn.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dsquant.model.families.family import GgufFacts
from dsquant.model.rotary import Rotary, plain_frequencies, yarn_mscale

# DeepSeek's converter wrote this factor into the YaRN key once, and the loader has divided by it ever since.
YARN_LOG_FACTOR = 0.1
BOUND_KEYS = "rope.scaling.yarn_"
# Of yarn's bounds: their names, and what llama.cpp takes.
BOUNDS = {"beta_fast": 32.0, "beta_slow": 1.0}
FACTORED = "llama3"
"""The scaling that is stored as a tensor of frequency factors."""


def starting_options(rope: Mapping[str, Any]) -> str:
    """Returns the options without which llama.cpp computes another rotary embedding than `rope_parameters` say, each
    behind a space; empty where it needs none."""
    if rope["rope_type"] != "yarn":
        return ""
    bounds = _bounds(rope)
    others = {name.replace("_", "-"): value for name, value in bounds.items() if value != BOUNDS[name]}
    return "".join(f" --yarn-{name} {value:g}" for name, value in others.items())


def _bounds(stated: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    return {name: float(stated.get(prefix + name) or own) for name, own in BOUNDS.items()}


def scaling_keys(rope: Mapping[str, Any], latent: bool, magnitude: float) -> dict[str, Any]:
    """Returns the keys of a network's `rope_parameters`, without the architecture's name, in the order of the file.

    `latent`: attention is over latents; `magnitude` is the rotary embedding's.
    """
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] != "yarn":
        return {}
    factor = float(rope["factor"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }
    keys |= {BOUND_KEYS + name: value for name, value in _bounds(rope).items()}
    if latent:
        if rope.get("mscale_all_dim") is not None:
            keys["rope.scaling.yarn_log_multiplier"] = YARN_LOG_FACTOR * float(rope["mscale_all_dim"])
        return keys
    attention = magnitude / yarn_mscale(factor)
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = attention
    return keys


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Returns Llama 3's frequency factors, stored in GGUF as the tensor `rope_freqs.weight`: float32 [head_dim / 2];
    None for other scalings. `config` has transformers' defaults filled in.

    Reference: transformers' `_compute_llama3_parameters`; ggml divides each frequency by its factor.
    """
    rope = config["rope_parameters"]
    if rope["rope_type"] != FACTORED:
        return None
    exponents = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rotary_of_keys(facts: GgufFacts, keys: Mapping[str, Any], factors_F: torch.Tensor | None) -> Rotary:
    """Returns the rotary embedding that llama.cpp, started with the keys' bounds of yarn, computes from keys without
    the architecture's name, and the tensor `rope_freqs.weight` where there is one; raises KeyError where a key without
    a default is missing, or the scaling is unknown."""
    key_length = keys.get("attention.key_length") or keys["embedding_length"] // keys["attention.head_count"]
    width, base = keys.get("rope.dimension_count", key_length), float(keys.get("rope.freq_base", 10000.0))
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise KeyError(f"rope.scaling.type {kind}")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))) or 1.0
    factor = 1.0 if kind == "none" else factor
    frequencies_F = plain_frequencies(base, width)
    if factors_F is not None and FACTORED in facts.rope_scalings:
        frequencies_F = frequencies_F / factors_F.double()
    attention, magnitude = float(keys.get("rope.scaling.attn_factor", 1.0)), 1.0
    log_multiplier = 0.0
    if facts.split is not None:
        log_multiplier = float(keys.get("rope.scaling.yarn_log_multiplier", 0.0)) / YARN_LOG_FACTOR
    if kind == "yarn":
        original = int(keys.get("rope.scaling.original_context_length", keys["context_length"]))
        extrapolated_F = _extrapolated(width, base, original, *_bounds(keys, BOUND_KEYS).values())
        frequencies_F = frequencies_F * (extrapolated_F + (1 - extrapolated_F) / factor)
        magnitude = yarn_mscale(factor) if log_multiplier == 0 else 1.0
    else:
        frequencies_F = frequencies_F / factor
    magnitude *= attention
    if facts.split is None:
        return Rotary(frequencies_F, magnitude, key_length**-0.5)
    # Latent attention takes the magnitude that ggml multiplies in beside yarn out again, also where no yarn put it in.
    logarithm = math.log(factor)
    before = magnitude if kind == "yarn" else magnitude * (1 + 0.1 * logarithm)
    scale = (before * (1 + 0.1 * log_multiplier * logarithm)) ** 2 * float(keys["attention.key_length_mla"]) ** -0.5
    return Rotary(frequencies_F, magnitude, scale)


def _extrapolated(width: int, base: float, original: int, fast: float, slow: float) -> torch.Tensor:
    """Returns how much of each frequency yarn keeps, [width / 2]; bounds in float32, as ggml computes them."""

    def bound(turns: float) -> float:
        single = np.float32
        return float(single(width) * np.log(single(original / (turns * 2 * math.pi))) / (2 * np.log(single(base))))

    low = max(0.0, math.floor(bound(fast)))
    high = min(width - 1.0, math.ceil(bound(slow)))
    places_F = torch.arange(width // 2, dtype=torch.float64)
    return 1 - ((places_F - low) / max(0.001, high - low)).clamp(0, 1)
