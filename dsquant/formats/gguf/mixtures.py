"""llama.cpp's mixtures: the type of each tensor by its part and its layer; and two of dsquant's.

Its rules for attention never match MLA's names, so in Q4_K_M the 1.4 % of R1's weights that every token uses get 4
bits; `Q4_K_M+` keeps them, the shared experts and the dense layers at 8. `NVFP4` keeps 8 bits
in MLA's attention but its output, and outside the layers.

Reference: `llama_tensor_get_type` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsquant.formats.gguf.types import FLOAT_TYPES, MIXTURES, block_of, fitting_type
from dsquant.model.families import sizes_of

# What chooses the keys that sparse attention sees is stored as released; llama-quantize takes it for any matrix.
_INDEXER = ".indexer."
_KEPT_AT_8_BITS = re.compile(r"\.(attn_\w+|ffn_(gate|up|down)(_shexp)?|nextn\.eh_proj)\.weight$")


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that the rules depend on."""

    num_layers: int
    """With the MTP layer, where the file holds it."""
    num_experts: int
    has_shared_expert: bool
    num_dense_layers: int
    """Layers before the first mixture; 0 for a dense network."""
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
        has_shared_expert=sizes.num_shared_experts > 0,
        num_dense_layers=sizes.num_dense_layers,
        num_query_groups=heads // key_value_heads,
        tied=tied,
        is_70b=config["num_hidden_layers"] == 80 and key_value_heads != heads,
    )


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the rules see it."""

    name: str
    shape: tuple[int, ...]
    facts: ModelFacts
    has_imatrix: bool

    @property
    def part(self) -> str:
        """Its part in the model, a key of `_RULES`' tables."""
        if self.name == "output.weight" or (self.facts.tied and self.name == "token_embd.weight"):
            return "head"
        if self.name == "token_embd.weight":
            return "embedding"
        return next((part for part, sign in _SIGNS.items() if re.search(sign, self.name)), "other")

    @property
    def layer(self) -> int:
        match = re.match(r"blk\.(\d+)\.", self.name)
        assert match is not None
        return int(match[1])

    @property
    def earlier_downs(self) -> int:
        """Down projections before this one: a layer of experts with a shared one has two."""
        facts = self.facts
        mixtures = max(0, self.layer - facts.num_dense_layers) if facts.num_experts else 0
        return self.layer + (mixtures if facts.has_shared_expert else 0) + self.name.endswith("_shexp.weight")


_SIGNS = {
    "values": r"\.attn_v\.weight", "keys": r"\.attn_k\.weight", "queries": r"\.attn_q\.weight",
    "output": r"\.attn_output\.weight", "gate or up": r"\.ffn_(gate|up)(_exps|_shexp)?\.weight", "down": r"\.ffn_down",
}  # fmt: skip
_Condition = Callable[[_Tensor], bool]
_Rules = tuple[tuple[_Condition, str], ...]
"""The first condition that holds counts."""


def _always(tensor: _Tensor) -> bool:
    return True


def _stacked(tensor: _Tensor) -> bool:
    return len(tensor.shape) == 3 and tensor.shape[0] > 1


def _grouped(tensor: _Tensor) -> bool:
    return tensor.facts.num_query_groups >= 4


def _grouped_or_mixture(tensor: _Tensor) -> bool:
    return _grouped(tensor) or tensor.facts.num_experts >= 4


def _eight_experts(tensor: _Tensor) -> bool:
    return tensor.facts.num_experts == 8


def _imatrix(tensor: _Tensor) -> bool:
    return tensor.has_imatrix


def _without(condition: _Condition) -> _Condition:
    return lambda tensor: not condition(tensor)


def _both(first: _Condition, second: _Condition) -> _Condition:
    return lambda tensor: first(tensor) and second(tensor)


def _before(layer: int) -> _Condition:
    return lambda tensor: tensor.layer < layer


def _in_first(part: int) -> _Condition:
    """In the layers up to the model's 8th or 16th part."""
    return lambda tensor: tensor.layer < tensor.facts.num_layers // part


def _first_downs(tensor: _Tensor) -> bool:
    return tensor.earlier_downs < tensor.facts.num_layers // 8


def _middle(tensor: _Tensor) -> bool:
    return tensor.facts.num_layers // 8 <= tensor.layer < 7 * tensor.facts.num_layers // 8


def _more_bits(tensor: _Tensor) -> bool:
    """In the first and last 8th of the layers, and in every third between."""
    return not _middle(tensor) or (tensor.layer - tensor.facts.num_layers // 8) % 3 == 2


def _all(type_name: str) -> _Rules:
    return ((_always, type_name),)


def _lowest(better: str, output: _Rules = ()) -> dict[str, _Rules]:
    """The mixtures of less than 3 bits: `better` is the type where they spend more."""
    return {
        "head": _all("Q5_K"),
        "embedding": _all(better),
        "values": ((_grouped_or_mixture, "Q4_K"), (_always, better)),
        "keys": ((_eight_experts, "Q4_K"),),
        "down": ((_first_downs, better),),
        "output": ((_eight_experts, "Q5_K"), *output),
    }


def _higher(**parts: _Rules) -> dict[str, _Rules]:
    """The other mixtures, with rules for some parts."""
    eight = ((_eight_experts, "Q8_0"),)
    return {**parts, "values": eight + parts.get("values", ()), "keys": eight + parts.get("keys", ())}


def _output(mixtures: str = "", eight: str = "Q5_K") -> _Rules:
    """Attention's output: a type, another where there are eight experts."""
    return ((_eight_experts, eight), *(_all(mixtures) if mixtures else ()))


_IQ4 = _higher(
    values=((_grouped, "Q5_K"),), down=((_both(_in_first(8), _without(_imatrix)), "Q5_K"),), output=_output()
)
_LOWEST = {
    "IQ1_S": _lowest("Q2_K", _all("IQ2_XXS")),
    "IQ1_M": _lowest("Q2_K", _all("IQ2_XXS")),
    "IQ2_XXS": _lowest("Q2_K"),
    "IQ2_XS": _lowest("Q2_K"),
    "IQ2_S": _lowest("IQ3_S", _all("IQ3_S")),
    "IQ2_M": _lowest("IQ3_S", _all("IQ3_S")),
}
_RULES = _LOWEST | {
    "Q2_K_S": _higher(values=((_grouped, "Q4_K"),), down=((_in_first(8), "Q4_K"),)),
    "Q2_K": _higher(values=((_grouped, "Q4_K"), (_always, "Q3_K")), down=_all("Q3_K"), output=_output("Q3_K")),
    "IQ3_XXS": {
        "head": _all("Q5_K"),
        "embedding": _all("IQ3_S"),
        **_higher(
            values=((_grouped, "Q4_K"), (_without(_imatrix), "IQ3_S")),
            keys=_all("IQ2_S"),
            queries=_all("IQ2_S"),
            down=((_imatrix, "IQ3_XXS"), (_in_first(8), "Q4_K"), (_always, "Q3_K")),
            output=_output("IQ3_S"),
        ),
    },
    "IQ3_XS": {
        "gate or up": ((_middle, "IQ3_XXS"),),
        **_higher(values=((_grouped, "Q4_K"),), keys=_all("IQ3_XXS"), queries=_all("IQ3_XXS"), output=_output()),
    },
    "IQ3_S": _higher(values=((_grouped, "Q4_K"),), output=_output()),
    "IQ3_M": _higher(
        values=_all("Q4_K"),
        down=((_in_first(8), "Q4_K"), (_both(_eight_experts, _more_bits), "Q4_K")),
        output=_output("Q4_K"),
    ),
    "Q3_K_S": _higher(output=_output()),
    "Q3_K_M": _higher(
        values=((_before(2), "Q5_K"), (_always, "Q4_K")),
        down=((_in_first(16), "Q5_K"), (_always, "Q4_K")),
        output=_output("Q4_K"),
    ),
    "Q3_K_L": _higher(values=_all("Q5_K"), down=_all("Q5_K"), output=_output("Q5_K", eight="Q3_K")),
    "IQ4_XS": _IQ4,
    "IQ4_NL": _IQ4,
    "Q4_0": _higher(down=((_both(_in_first(8), _imatrix), "Q4_1"),)),
    "Q4_K_S": _higher(values=((_before(4), "Q5_K"),), down=((_in_first(8), "Q5_K"),), output=_output()),
    "Q4_K_M": _higher(values=((_more_bits, "Q6_K"),), down=((_more_bits, "Q6_K"),), output=_output()),
    "Q5_0": _higher(down=((_both(_in_first(8), _imatrix), "Q5_1"),)),
    "Q5_K_M": _higher(values=((_more_bits, "Q6_K"),), down=((_more_bits, "Q6_K"),)),
    "NVFP4": dict.fromkeys(("head", "embedding", "other"), _all("Q8_0")),
    "MXFP4_MOE": dict.fromkeys(("head", "embedding", *_SIGNS, "other"), ((_stacked, "MXFP4"), (_always, "Q8_0"))),
}


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
    if _INDEXER in tensor and MIXTURES[mixture] not in FLOAT_TYPES:
        return "BF16", None
    wanted = _preferred(_Tensor(tensor, shape, facts, has_imatrix), mixture)
    wanted = next((type_name for pattern, type_name in overrides if pattern.search(tensor)), wanted)
    stored = fitting_type(wanted, shape[-1])
    return stored, None if stored == wanted else wanted


def _preferred(tensor: _Tensor, mixture: str) -> str:
    base, part = MIXTURES[mixture], tensor.part
    if base in FLOAT_TYPES:
        return base
    if mixture == "Q4_K_M+":
        if _KEPT_AT_8_BITS.search(tensor.name):
            return "Q8_0"
        mixture = "Q4_K_M"
    rules = _RULES.get(mixture, _higher())
    if part == "head":
        if base == "Q8_0" or tensor.shape[-1] % block_of(base)[0]:
            return "Q8_0"
        base = "Q6_K"
    chosen = next((type_name for condition, type_name in rules.get(part, ()) if condition(tensor)), base)
    raised = part == "values" and tensor.facts.is_70b and mixture not in _LOWEST and chosen in ("Q3_K", "Q4_K")
    return "Q5_K" if raised else chosen
