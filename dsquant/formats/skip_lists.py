"""The lists in config.json that tell engines which modules are not quantized.

How they are matched, as read in the engines' sources (November 2026):
* AWQ's `modules_to_not_convert`: vLLM and SGLang skip a layer when an entry is a substring of its name; transformers
  when the name begins with an entry (as a regular expression) or ends with it. So an entry is a beginning that goes
  down to a whole module, or an ending.
* compressed-tensors' `ignore`: full module names, or regular expressions after `re:`; every linear that the checkpoint
  does not quantize has to match, `lm_head` and the router too.
Engines fuse gate_proj with up_proj, q_a_proj with kv_a_proj_with_mqa, and q_proj with k_proj and v_proj (`FUSED`). vLLM
looks the parts of what is skipped up one by one: all parts of a fused layer must agree, which presets and targets give.
SGLang 0.5.23 looks for AWQ's entries in the fused layer's own name, and calls an MTP layer `model.decoder`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dsquant.model.families import gqa, mla, mlps, mtp
from dsquant.model.structure import ROUTER

HEAD = "lm_head"
FUSED = {**mla.FUSED_BY_ENGINES, **gqa.FUSED_BY_ENGINES, **mlps.FUSED_BY_ENGINES}


def skipped_modules(linears: Mapping[str, bool], mtp_layer: str = "") -> list[str]:
    """Returns AWQ's `modules_to_not_convert`, sorted: entries that occur in the name of every unquantized linear and of
    no other, for every linear of the decoder -> whether it is quantized.

    `mtp_layer` is the module of the multi-token-prediction layer, if any. The router is named by its layer's number,
    since `mlp.gate` alone would match `mlp.gate_proj`.
    """
    kept = [name for name, quantized in linears.items() if quantized]
    entries = {HEAD, *mtp.MATRICES}
    for name, quantized in linears.items():
        if not quantized and not any(entry in name for entry in entries):
            entries.add(_skipping(name, kept))
    layers = {_layer(name) for name in kept if ".experts." in name}
    entries.update(_router(layer, kept) for layer in layers if not any(e in f"{layer}{ROUTER}" for e in entries))
    unquantized = {name: 0 for name, quantized in linears.items() if not quantized}
    entries.update(name for name, _ in _fused(unquantized) if not any(entry in name for entry in entries))
    if mtp_layer:
        entries |= {mtp.DRAFT + entry.removeprefix(mtp_layer) for entry in entries if entry.startswith(f"{mtp_layer}.")}
    return sorted(entries)


def _fused(widths: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the name and width of every fused layer whose parts all have it."""
    for name, width in widths.items():
        parent, _, part = name.rpartition(".")
        for fused, parts in FUSED.items():
            if (
                part == parts[0]
                and ".experts." not in name
                and all(widths.get(f"{parent}.{p}") == width for p in parts)
            ):
                yield f"{parent}.{fused}", width


def rows_in_engines(shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Returns linear -> rows of what engines make of it and of those that they fuse with it, for linear -> [O, I]."""
    rows = {linear: height for linear, (height, _) in shapes.items()}
    for name, _ in _fused(dict.fromkeys(shapes, 0)):
        parent, _, fused = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED[fused]]
        rows |= dict.fromkeys(parts, sum(shapes[part][0] for part in parts))
    return rows


def targets_by_width(widths: Mapping[str, Any], others: bool = True) -> dict[Any, list[str]]:
    """Returns compressed-tensors' `targets`, bits (or bits and size of groups) in ascending order -> regular
    expressions of whole names, one for each kind of linear, for every quantized linear -> bits (or both).

    vLLM and SGLang look for a fused layer's name, then for its class, then for its parts, so each group names its
    linears and what engines fuse of them; only then, with `others`, the class `Linear` stands for what most of
    them have: SGLang 0.5.23 takes its group for that of the experts.
    """
    layers: dict[tuple[Any, str], dict[int, None]] = {}
    for name, width in (*widths.items(), *_fused(widths)):
        _, _, number, inside = name.split(".", 3)
        kind = re.escape(re.sub(r"\.experts\.\d+\.", ".experts.0.", inside)).replace(r"experts\.0\.", r"experts\.\d+\.")
        layers.setdefault((width, kind), {})[int(number)] = None
    found: dict[Any, list[str]] = {}
    for (width, kind), numbers in sorted(layers.items()):
        found.setdefault(width, []).append(rf"re:.*layers\.({'|'.join(map(str, numbers))})\.{kind}$")
    if others:
        found[Counter(widths.values()).most_common(1)[0][0]].append("Linear")
    return found


def _skipping(name: str, kept: Iterable[str]) -> str:
    """Returns the linear's parent module where nothing in it is quantized; else its kind where no linear of that is;
    else the linear."""
    parent = name.rsplit(".", 1)[0]
    inside_experts = re.sub(r"\.experts\.\d+$", "", parent)
    experts = re.sub(r"\.\d+$", "", parent)  # engines ask for a layer's experts as one module
    whole = (entry for entry in (inside_experts, experts, parent) if not _inside(entry, kept))
    kind = name.rsplit(".", 1)[1]  # such as kv_b_proj, in every layer
    return next(whole, name if any(kind in other for other in kept) else kind)


def _inside(module: str, kept: Iterable[str]) -> bool:
    return any(other.startswith(f"{module}.") for other in kept)


def _layer(name: str) -> str:
    return name[: name.index(".", len("model.layers.")) + 1]


def _router(layer: str, kept: Iterable[str]) -> str:
    return ROUTER if not any(ROUTER in other for other in kept) else f"{layer}{ROUTER}"


def ignored_modules(linears: Mapping[str, bool]) -> list[str]:
    """Returns compressed-tensors' `ignore` for every linear of the decoder -> whether it is quantized: full names of
    the unquantized ones, the router's and the head's among them; MTP's own linears by regular expressions."""
    names = {name for name, quantized in linears.items() if not quantized}
    routers = {f"{_layer(name)}{ROUTER}" for name in linears if ".experts." in name}
    extra = [f"re:.*{re.escape(part)}$" for part in mtp.MATRICES]
    return [HEAD, *sorted(names | routers), *extra]
