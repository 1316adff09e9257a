"""The lists in config.json that tell engines which modules are not quantized.

How they are matched, as read in the engines' sources (November 2026):
* AWQ's `modules_to_not_convert`: vLLM and SGLang skip a layer when an entry is a substring of its name; transformers
  when the name begins with an entry (as a regular expression) or ends with it. So an entry is a beginning that goes
  down to a whole module, or an ending.
* compressed-tensors' `ignore`: full module names, or regular expressions after `re:`; every linear that the checkpoint
  does not quantize has to match, `lm_head` and the router too.
Engines fuse gate_proj with up_proj, q_a_proj with kv_a_proj_with_mqa, and q_proj with k_proj and v_proj, and look the
parts up one by one: all parts of a fused layer must agree, which both presets give.
"""

import re
from collections.abc import Iterable, Mapping

from dsquant.model.families.mtp import MATRICES as MTP_MATRICES
from dsquant.model.structure import ROUTER

HEAD = "lm_head"


def skipped_modules(linears: Mapping[str, bool]) -> list[str]:
    """Returns AWQ's `modules_to_not_convert`, sorted: entries that occur in the name of every unquantized linear and of
    no other, for every linear of the decoder -> whether it is quantized.

    The router is named by its layer's number, since `mlp.gate` alone would match `mlp.gate_proj`.
    """
    kept = [name for name, quantized in linears.items() if quantized]
    entries = {HEAD, *MTP_MATRICES}
    for name, quantized in linears.items():
        if not quantized and not any(entry in name for entry in entries):
            entries.add(_skipping(name, kept))
    layers = {_layer(name) for name in kept if ".experts." in name}
    entries.update(_router(layer, kept) for layer in layers if not any(e in f"{layer}{ROUTER}" for e in entries))
    return sorted(entries)


def targets_by_width(widths: Mapping[str, int]) -> dict[int, list[str]]:
    """Returns compressed-tensors' `targets`, bits in ascending order -> regular expressions of whole names, one for
    each kind of linear, for every quantized linear -> bits.

    vLLM and SGLang look for a fused layer's name, then for its class, then for its parts: a group for the class
    `Linear` would win over names of parts, so each group names its linears.
    """
    layers: dict[tuple[int, str], dict[int, None]] = {}
    for name, bits in widths.items():
        _, _, number, inside = name.split(".", 3)
        kind = re.escape(re.sub(r"\.experts\.\d+\.", ".experts.0.", inside)).replace(r"experts\.0\.", r"experts\.\d+\.")
        layers.setdefault((bits, kind), {})[int(number)] = None
    found: dict[int, list[str]] = {}
    for (bits, kind), numbers in sorted(layers.items()):
        found.setdefault(bits, []).append(rf"re:.*layers\.({'|'.join(map(str, numbers))})\.{kind}$")
    return found


def _skipping(name: str, kept: Iterable[str]) -> str:
    """Returns the linear's parent module where nothing in it is quantized; else the linear."""
    parent = name.rsplit(".", 1)[0]
    inside_experts = re.sub(r"\.experts\.\d+$", "", parent)
    experts = re.sub(r"\.\d+$", "", parent)  # engines ask for a layer's experts as one module
    return next(
        (
            entry
            for entry in (inside_experts, experts, parent)
            if not any(other.startswith(f"{entry}.") for other in kept)
        ),
        name,
    )


def _layer(name: str) -> str:
    return name[: name.index(".", len("model.layers.")) + 1]


def _router(layer: str, kept: Iterable[str]) -> str:
    return ROUTER if not any(ROUTER in other for other in kept) else f"{layer}{ROUTER}"


def ignored_modules(linears: Mapping[str, bool]) -> list[str]:
    """Returns compressed-tensors' `ignore` for every linear of the decoder -> whether it is quantized: full names of
    the unquantized ones, the router's and the head's among them; MTP's own linears by regular expressions."""
    names = {name for name, quantized in linears.items() if not quantized}
    routers = {f"{_layer(name)}{ROUTER}" for name in linears if ".experts." in name}
    extra = [f"re:.*{re.escape(part)}$" for part in MTP_MATRICES]
    return [HEAD, *sorted(names | routers), *extra]
