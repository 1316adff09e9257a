"""Rules of llama.cpp's loader for numbers, checked before the first weight is converted.

Reference: load_hparams in src/llama-model.cpp, and the architectures of src/models, whose own rules families state.
"""

from collections.abc import Mapping
from typing import Any

from dsquant.formats.gguf.metadata import model_keys
from dsquant.formats.gguf.rope import rope_factors, rotary_of_keys
from dsquant.model.families.family import GgufFacts
from dsquant.model.rotary import Rotary

LARGEST_LAYERS = 512
# Keys inside a config's rope parameters that are written, read as they are by everybody, or change nothing.
_READ = (
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "finetuned",
)  # fmt: skip
READ_BY_TYPE = {
    "default": _READ,
    "linear": _READ,
    "llama3": (*_READ, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_READ, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
}


def loading_problem(facts: GgufFacts, config: Mapping[str, Any], rotary: Rotary) -> str | None:
    """Returns in words why llama.cpp would not load a network, or would compute another function with it; else None.

    `config` is the network's, with transformers' defaults filled in.
    """
    return number_problem(facts, config) or _rope_problem(facts, config, rotary)


def number_problem(facts: GgufFacts, config: Mapping[str, Any]) -> str | None:
    """Returns in words which number of a network llama.cpp does not load, or reads as another; else None."""
    if config["hidden_act"] not in ("silu", "swish"):
        return f"hidden_act {config['hidden_act']!r}: llama.cpp's {facts.architecture} computes silu"
    layers = config["num_hidden_layers"]
    if layers > LARGEST_LAYERS:
        return f"num_hidden_layers {layers}: llama.cpp loads up to {LARGEST_LAYERS}"
    return next(iter(facts.problems(config)), None)


def _rope_problem(facts: GgufFacts, config: Mapping[str, Any], wanted: Rotary) -> str | None:
    """Returns in words why llama.cpp would compute another rotary embedding than the network's; else None."""
    rope = config["rope_parameters"]
    kind, known = rope["rope_type"], facts.rope_scalings
    if kind not in known:
        return (
            f"rope scaling of type {kind!r} has no place in a GGUF file of {facts.architecture} (it has "
            f"{', '.join(known)})"
        )
    unread = [key for key in rope if key not in READ_BY_TYPE[kind] and rope[key] is not None]
    if unread:
        return f"llama.cpp does not read {', '.join(unread)} of rope scaling {dict(rope)}"
    found = rotary_of_keys(facts, model_keys(facts, config, wanted), rope_factors(config))
    difference = wanted.difference(found)
    if difference is None:
        return None
    if kind == "yarn" and facts.split is not None:
        return (
            f"rope scaling {dict(rope)}: llama.cpp assumes that mscale is mscale_all_dim, and would have {difference}"
        )
    return f"rope scaling {dict(rope)}: llama.cpp takes truncate for granted, and would have {difference}"
