"""Types of the tensors of a GGUF file: llama.cpp's own rules for these architectures, and one better mixture.

Reference: `llama_tensor_get_type` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp. Its rules for
attention never match MLA's names, so in Q4_K_M the 1.4 % of R1's weights that every token uses get 4 bits; `Q4_K_M+`
keeps them, the shared experts and the dense layers at 8.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsquant.errors import UsageError
from dsquant.model.families import sizes_of

TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
FLOAT_TYPES = ("F32", "F16", "BF16")
# Value of `--type`, which is llama.cpp's name for the mixture -> the type of most tensors.
MIXTURES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q5_0": "Q5_0", "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q4_K_M+": "Q4_K", "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
# The type that takes a row whose length is not a multiple of a block of 256.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
# Types that a target chooses from: engines run them fast; from the fewest bits to the most.
CANDIDATES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_KEPT_AT_8_BITS = re.compile(r"\.(attn_\w+|ffn_(gate|up|down)(_shexp)?|nextn\.eh_proj)\.weight$")


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that the rules depend on."""

    num_layers: int
    """With the MTP layer, where the file holds it."""
    num_experts: int
    num_query_groups: int
    """Query heads of a key-value head; MLA counts as one key-value head."""
    tied: bool
    """Whether the embedding is also the head."""
    is_70b: bool


def model_facts(config: Mapping[str, Any], num_layers: int, tied: bool) -> ModelFacts:
    """Reads the facts from config.json's content."""
    sizes = sizes_of(config)
    heads, key_value_heads = int(config["num_attention_heads"]), sizes.cache.key_value_heads
    return ModelFacts(
        num_layers=num_layers,
        num_experts=sizes.num_experts,
        num_query_groups=heads // key_value_heads,
        tied=tied,
        is_70b=config["num_hidden_layers"] == 80 and key_value_heads != heads,
    )


@cache
def block_of(type_name: str) -> tuple[int, int]:
    """Returns a block's weights and bytes, from gguf-py."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]


def file_type_of(mixture: str) -> int:
    """Returns the number of a mixture, a key of `MIXTURES`, in `general.file_type`, from gguf-py."""
    from gguf import LlamaFileType

    name = mixture.removesuffix("+")
    return LlamaFileType[f"ALL_{name}" if name == "F32" else f"MOSTLY_{name}"].value


def row_bytes(type_name: str, columns: int) -> int:
    block, size = block_of(type_name)
    return columns // block * size


def parse_overrides(texts: Sequence[str]) -> list[tuple[re.Pattern[str], str]]:
    """Parses `--tensor-type REGEX=TYPE`, in order: the first pattern found in a tensor's name counts.

    Raises UsageError where one is not of that form, its type unknown or its pattern not a regular expression.
    """
    overrides = []
    for text in texts:
        pattern, separator, type_name = text.rpartition("=")
        if not separator or not pattern or type_name.upper() not in TYPES:
            raise UsageError(f"--tensor-type {text!r}: write REGEX=TYPE with a type of {', '.join(TYPES)}")
        try:
            overrides.append((re.compile(pattern), type_name.upper()))
        except re.error as error:
            raise UsageError(f"--tensor-type {text!r}: {pattern!r} is no regular expression: {error}") from error
    return overrides


def choose_type(
    tensor: str,
    shape: tuple[int, ...],
    mixture: str,
    facts: ModelFacts,
    has_imatrix: bool,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
) -> tuple[str, str | None]:
    """Returns the type of a tensor (shape as stored, columns last) in a mixture, a key of `MIXTURES`, with
    `parse_overrides`; and the type that was wanted where rows of this length do not fit it."""
    if len(shape) < 2 or not tensor.endswith(".weight") or "_norm.weight" in tensor or ".ffn_gate_inp." in tensor:
        return "F32", None
    base = MIXTURES[mixture]
    wanted = base if base in FLOAT_TYPES else _preferred(tensor, shape[-1], mixture, base, facts, has_imatrix)
    wanted = next((type_name for pattern, type_name in overrides if pattern.search(tensor)), wanted)
    stored = fitting_type(wanted, shape[-1])
    return stored, None if stored == wanted else wanted


def fitting_type(wanted: str, columns: int) -> str:
    """Returns the wanted type where rows of so many columns fit it; else its fallback, or F16 where that does not fit
    either."""
    fitting = (name for name in (wanted, _FALLBACKS.get(wanted, "F16")) if columns % block_of(name)[0] == 0)
    return next(fitting, "F16")


def _preferred(tensor: str, columns: int, mixture: str, base: str, facts: ModelFacts, has_imatrix: bool) -> str:
    if tensor == "output.weight" or (facts.tied and tensor == "token_embd.weight"):
        return "Q8_0" if base == "Q8_0" or columns % block_of(base)[0] else "Q6_K"
    if mixture == "Q4_K_M+":
        if _KEPT_AT_8_BITS.search(tensor):
            return "Q8_0"
        mixture = "Q4_K_M"
    match = re.match(r"blk\.(\d+)\.", tensor)
    if match is None:
        return base
    layer = int(match[1])
    if ".attn_v.weight" in tensor:
        return _attention_values(mixture, base, layer, facts)
    if ".attn_k.weight" in tensor:
        return "Q8_0" if facts.num_experts == 8 else base
    if ".ffn_down" in tensor:
        return _down(mixture, base, layer, facts.num_layers, has_imatrix)
    if ".attn_output.weight" in tensor:
        return _attention_output(mixture, base, facts)
    return base


def _more_bits(layer: int, num_layers: int) -> bool:
    return layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2


def _attention_values(mixture: str, base: str, layer: int, facts: ModelFacts) -> str:
    grouped = facts.num_query_groups >= 4
    chosen = base
    if mixture == "Q2_K":
        chosen = "Q4_K" if grouped else "Q3_K"
    elif mixture == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif mixture in ("IQ4_NL", "IQ4_XS") and grouped:
        chosen = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, facts.num_layers):
        chosen = "Q6_K"
    elif mixture == "Q4_K_S" and layer < 4:
        chosen = "Q5_K"
    if facts.is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if facts.num_experts == 8 else chosen


def _down(mixture: str, base: str, layer: int, num_layers: int, has_imatrix: bool) -> str:
    first = layer < num_layers // 8
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(layer, num_layers) else base
    if first and (mixture == "Q4_K_S" or (mixture in ("IQ4_NL", "IQ4_XS") and not has_imatrix)):
        return "Q5_K"
    if first and has_imatrix and mixture in ("Q4_0", "Q5_0"):
        return "Q4_1" if mixture == "Q4_0" else "Q5_1"
    return base


def _attention_output(mixture: str, base: str, facts: ModelFacts) -> str:
    if facts.num_experts == 8:
        raised = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
        return "Q5_K" if mixture in raised else base
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(mixture, base)
