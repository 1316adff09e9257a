"""The architectures that dsquant knows, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.model.families.deepseek_v2 import DEEPSEEK_V2
from dsquant.model.families.deepseek_v3 import DEEPSEEK_V3
from dsquant.model.families.deepseek_v32 import DEEPSEEK_V32
from dsquant.model.families.family import Family, Sizes
from dsquant.model.families.glm4_moe import GLM4_MOE
from dsquant.model.families.glm4_moe_lite import GLM4_MOE_LITE
from dsquant.model.families.glm_moe_dsa import GLM_MOE_DSA
from dsquant.model.families.llama import LLAMA, QWEN2, QWEN3
from dsquant.model.families.qwen3_moe import QWEN3_MOE

# What other architectures' configs state and none of these networks has, with the values that change nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "sliding_window_pattern": (), "no_rope_layers": (),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_scale": (1,), "logits_scaling": (1,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "attention_multiplier": (),
    "query_pre_attn_scalar": (), "clip_qkv": (), "scale_emb": (1,), "scale_depth": (), "qk_layernorm": (False,),
    "use_qk_norm": (False,), "attn_temperature_tuning": (False,), "alibi": (False,), "is_causal": (True,),
}  # fmt: skip
# Kinds of attention by layer; the second is sparse.
FULL_ATTENTION, INDEXED_ATTENTION = "full_attention", "indexed_attention"

_ALL = (DEEPSEEK_V3, DEEPSEEK_V2, DEEPSEEK_V32, GLM4_MOE, GLM4_MOE_LITE, GLM_MOE_DSA, LLAMA, QWEN2, QWEN3, QWEN3_MOE)
FAMILIES = {family.architecture: family for family in _ALL}
# By `general.architecture` of a GGUF file: of those that share the name, the first.
GGUF_FAMILIES = {family.gguf.architecture: family for family in reversed(_ALL)}

# Architectures that are asked for and not supported -> why.
_V4 = (
    "its experts are released in 4 bits (MXFP4), all else in FP8, and engines read both: 4 bits have nothing to do "
    "there, and fewer need a forward that dsquant does not have (docs/decisions/0034)"
)
REFUSED = {"DeepseekV4ForCausalLM": _V4, "DeepseekV41ForCausalLM": _V4}


def gguf_families(architecture: str) -> list[Family]:
    """The families whose networks llama.cpp knows by a name."""
    return [family for family in _ALL if family.gguf.architecture == architecture]


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of a config's `architectures`; empty where it names none."""
    found = config.get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The numbers of the network that the config of a supported architecture describes."""
    return FAMILIES[architecture_of(config)].sizes(config)


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a network with routed experts; false for architectures that are not supported."""
    family = FAMILIES.get(architecture_of(config))
    return family is not None and family.is_mixture(config)


def unsupported(folder: Path, architecture: str) -> InputError:
    """The error for an architecture that dsquant does not know; it may stand in quotes, with words behind it."""
    reason = next((words for name, words in REFUSED.items() if name in architecture), "")
    reason = reason or f"dsquant knows {', '.join(FAMILIES)}"
    return InputError(f"{folder / 'config.json'}: architecture {architecture} is not supported; {reason}")


def family_of(folder: Path, config: Mapping[str, Any]) -> Family:
    """Finds the family of a checkpoint.

    Args:
        folder: the checkpoint's folder, for the message.
        config: its config.json.

    Returns:
        The family.

    Raises:
        InputError: where the architecture, or something in the config, is not supported.
    """
    architecture = architecture_of(config)
    if architecture not in FAMILIES:
        raise unsupported(folder, repr(architecture))
    family = FAMILIES[architecture]
    reason = _foreign(config, family) or family.refuse(config)
    if reason:
        raise InputError(f"{folder / 'config.json'}: {architecture}: {reason}")
    return family


def _foreign(config: Mapping[str, Any], family: Family) -> str | None:
    """What a config states that engines of these architectures would leave out, in words."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stated = {**(rope if isinstance(rope, Mapping) else {}), **config}
    for key, neutral in FOREIGN.items():
        value = stated.get(key)
        if value is not None and value not in neutral and key not in family.states:
            return f"{key} {value!r:.80} is not supported: this architecture has nothing of the kind"
    layer_types = config.get("layer_types")
    known = {INDEXED_ATTENTION if family.sparse else FULL_ATTENTION}
    if layer_types is not None and (not isinstance(layer_types, list) or set(map(str, layer_types)) - known):
        return f"layer_types {layer_types!r:.80}: attention that is not full is not supported"
    return None
