"""Rotary embeddings in GGUF: the keys that say them, and what llama.cpp computes from such keys.

llama.cpp takes yarn's beta_fast 32, beta_slow 1 and whole-numbered bounds for granted in these architectures, reads
frequency factors in `llama` alone, and in `deepseek2` derives the scale of the scores from yarn's magnitude. So what a
config says is written in keys, the keys are computed as llama.cpp does, and a difference is refused.

Reference: src/llama-context.cpp (yarn_attn_factor), src/models/deepseek2.cpp (kq_scale) and ggml's rope_yarn.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dsquant.model.rotary import Rotary, plain_frequencies, yarn_mscale

# DeepSeek's converter wrote this factor into the YaRN key once, and the loader has divided by it ever since.
YARN_LOG_FACTOR = 0.1
BETA_FAST, BETA_SLOW = 32.0, 1.0
# GGUF architecture -> the kinds of scaling that it can hold.
SCALINGS = {
    "deepseek2": ("default", "yarn"),
    "llama": ("default", "linear", "yarn", "llama3"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
}
# Keys inside a config's rope parameters that are written, read as they are by everybody, or change nothing.
_READ = ("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "finetuned")
READ_BY_TYPE = {
    "default": _READ,
    "linear": _READ,
    "llama3": (*_READ, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_READ, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}


def rope_refusal(architecture: str, config: Mapping[str, Any], wanted: Rotary) -> str | None:
    """Says why llama.cpp would compute another rotary embedding than a network's; None where it would not.

    Args:
        architecture: the GGUF architecture.
        config: the network's, with transformers' defaults filled in.
        wanted: the network's rotary embedding.

    Returns:
        The reason in words.
    """
    rope = config["rope_parameters"]
    kind, known = rope["rope_type"], SCALINGS[architecture]
    if kind not in known:
        return (
            f"rope scaling of type {kind!r} has no place in a GGUF file of {architecture} (it has {', '.join(known)})"
        )
    unread = [key for key in rope if key not in READ_BY_TYPE[kind] and rope[key] is not None]
    if unread:
        return f"llama.cpp does not read {', '.join(unread)} of rope scaling {dict(rope)}"
    found = rotary_of_keys(architecture, _number_keys(architecture, config, wanted.magnitude), rope_factors(config))
    difference = wanted.difference(found)
    if difference is None:
        return None
    if kind == "yarn" and architecture == "deepseek2":
        return (
            f"rope scaling {dict(rope)}: llama.cpp assumes that mscale is mscale_all_dim, and would have {difference}"
        )
    return (
        f"rope scaling {dict(rope)}: llama.cpp takes beta_fast {BETA_FAST:.0f}, beta_slow {BETA_SLOW:.0f} and truncate "
        f"for granted, and would have {difference}"
    )


def _number_keys(architecture: str, config: Mapping[str, Any], magnitude: float) -> dict[str, Any]:
    """The keys that rotary embeddings depend on, as `rotary_of_keys` reads them."""
    latent = architecture == "deepseek2"
    rope = config["rope_parameters"]
    head_dim = config["qk_rope_head_dim"] if latent else config["head_dim"]
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
    }
    if latent:
        keys["attention.key_length_mla"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return keys | scaling_keys(rope, latent, magnitude)


def scaling_keys(rope: Mapping[str, Any], latent: bool, magnitude: float) -> dict[str, Any]:
    """The keys of rope scaling.

    Args:
        rope: a network's `rope_parameters`.
        latent: whether its attention is DeepSeek's.
        magnitude: of its rotary embedding.

    Returns:
        Key without the architecture's name -> value, in the order of the file.
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
        "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or BETA_FAST),
        "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or BETA_SLOW),
    }
    if latent:
        if rope.get("mscale_all_dim") is not None:
            keys["rope.scaling.yarn_log_multiplier"] = YARN_LOG_FACTOR * float(rope["mscale_all_dim"])
        return keys
    attention = magnitude / yarn_mscale(factor)
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = attention
    return keys


def rope_factors(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Llama 3's frequency factors, which GGUF stores as the tensor `rope_freqs.weight`.

    Reference: transformers' `_compute_llama3_parameters`; ggml divides each frequency by its factor.

    Args:
        config: the network's, with transformers' defaults filled in.

    Returns:
        float32 [head_dim / 2]; None where the model does not scale its frequencies so.
    """
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return None
    exponents = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def rotary_of_keys(architecture: str, keys: Mapping[str, Any], factors_F: torch.Tensor | None) -> Rotary:
    """Works out the rotary embedding that llama.cpp computes from a file's keys.

    Args:
        architecture: the file's, a key of `SCALINGS`.
        keys: key without the architecture's name -> value.
        factors_F: the tensor `rope_freqs.weight`, where the file has one.

    Returns:
        The rotary embedding.

    Raises:
        KeyError: where a key without a default is missing, or the type of scaling is unknown.
    """
    key_length = keys.get("attention.key_length") or keys["embedding_length"] // keys["attention.head_count"]
    width, base = keys.get("rope.dimension_count", key_length), float(keys.get("rope.freq_base", 10000.0))
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise KeyError(f"rope.scaling.type {kind}")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))) or 1.0
    factor = 1.0 if kind == "none" else factor
    frequencies_F = plain_frequencies(base, width)
    if factors_F is not None and architecture == "llama":
        frequencies_F = frequencies_F / factors_F.double()
    attention, magnitude = float(keys.get("rope.scaling.attn_factor", 1.0)), 1.0
    log_multiplier = 0.0
    if architecture == "deepseek2":
        log_multiplier = float(keys.get("rope.scaling.yarn_log_multiplier", 0.0)) / YARN_LOG_FACTOR
    if kind == "yarn":
        original = int(keys.get("rope.scaling.original_context_length", keys["context_length"]))
        extrapolated_F = _extrapolated(width, base, original)
        frequencies_F = frequencies_F * (extrapolated_F + (1 - extrapolated_F) / factor)
        magnitude = yarn_mscale(factor) if log_multiplier == 0 else 1.0
    else:
        frequencies_F = frequencies_F / factor
    magnitude *= attention
    if architecture != "deepseek2":
        return Rotary(frequencies_F, magnitude, key_length**-0.5)
    # deepseek2 takes the magnitude that ggml multiplies in beside yarn out again, also where no yarn put it in.
    logarithm = math.log(factor)
    before = magnitude if kind == "yarn" else magnitude * (1 + 0.1 * logarithm)
    scale = (before * (1 + 0.1 * log_multiplier * logarithm)) ** 2 * float(keys["attention.key_length_mla"]) ** -0.5
    return Rotary(frequencies_F, magnitude, scale)


def _extrapolated(width: int, base: float, original: int) -> torch.Tensor:
    """How much of each frequency yarn leaves as it is, [width / 2]; bounds in float32, as ggml computes them."""

    def bound(turns: float) -> float:
        single = np.float32
        return float(single(width) * np.log(single(original / (turns * 2 * math.pi))) / (2 * np.log(single(base))))

    low = max(0.0, math.floor(bound(BETA_FAST)))
    high = min(width - 1.0, math.ceil(bound(BETA_SLOW)))
    places_F = torch.arange(width // 2, dtype=torch.float64)
    return 1 - ((places_F - low) / max(0.001, high - low)).clamp(0, 1)
