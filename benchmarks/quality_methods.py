"""The quantizers that `benchmarks.quality` compares: peers, and dsquant's presets, steps and widths."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

from dsquant.formats.table import SAFETENSORS
from dsquant.presets import STEPS, WIDEST_FOR_PREDICTIONS, Preset, default_steps

# The last is what llama.cpp's Q4_K_M takes on the models here.
MIXED_BITS = ("4.25", "4.5", "4.95")
GGUF_BITS = ("3.9", "4.5", "4.95")


@dataclass(frozen=True)
class Method:
    """One quantizer with its options, run as a process of its own."""

    name: str
    label: str
    environment: str | None
    """The peer's, and the module in benchmarks/peers that runs in it; None for dsquant."""
    options: tuple[str, ...] = ()
    """Of dsquant's the command is the first."""


PEERS = [
    Method("autoawq", "AutoAWQ, asymmetric", "autoawq"),
    Method("llmcompressor", "llm-compressor AWQ, symmetric", "llmcompressor"),
    Method("llmcompressor-gptq", "llm-compressor AWQ + GPTQ, symmetric", "llmcompressor", ("--gptq",)),
    Method("gptqmodel", "GPTQModel GPTQ, symmetric", "gptqmodel"),
    Method("gptqmodel-mse", "GPTQModel GPTQ, range search, symmetric", "gptqmodel", ("--mse", "2.4")),
    Method("autoround", "AutoRound, 200 steps, symmetric", "autoround"),
    Method("autoround-asym", "AutoRound, 200 steps, asymmetric", "autoround", ("--asymmetric",)),
    Method("llamacpp", "llama.cpp Q4_K_M, imatrix", "llamacpp"),
]


AWQ = ("awq", "--bits", "4", "--kv-b", "quantize")  # every linear, as the peers
COMPRESSED = ("--to", "compressed-tensors", "--rest", "bf16")
# Embedding and output head stay float32, as everywhere here.
GGUF = ("gguf", "--type", "Q4_K_M", "--tensor-type", r"^(token_embd|output)\.weight$=F32")


def own_methods() -> list[Method]:
    """dsquant's presets that quantize every linear, in both forms; widths, and types, that are chosen for a mean."""
    forms = {
        "asymmetric": ("--to", "awq"),
        "symmetric": (*COMPRESSED, "--symmetric"),
    }
    presets = [preset for preset in get_args(Preset) if preset != "quality"]
    uniform = [
        Method(f"dsquant-{preset}-{form}", f"dsquant {preset}, {form}", None, (*AWQ, "--preset", preset, *options))
        for preset in presets
        for form, options in forms.items()
    ]
    mixed = [
        Method(
            f"dsquant-compact-mixed-{bits}",
            f"dsquant compact, symmetric, widths chosen for {bits} bits",
            None,
            (*AWQ, "--preset", "compact", "--target-bits", bits, *forms["symmetric"]),
        )
        for bits in MIXED_BITS
    ]
    gguf = [
        Method(
            f"dsquant-gguf-{bits}", f"dsquant GGUF, types chosen for {bits} bits", None, (*GGUF, "--target-bits", bits)
        )
        for bits in GGUF_BITS
    ]
    return [*uniform, *mixed, Method("dsquant-gguf-q4_k_m", "dsquant GGUF, Q4_K_M", None, GGUF), *gguf]


def step_methods() -> list[Method]:
    """dsquant's steps: each alone, and what presets of narrow models give with one step less or more; symmetric.

    `predictions` is there only beside `follow`, which it needs.
    """
    chosen: dict[tuple[str, ...], tuple[str, ...]] = {("none",): ("none",)}
    chosen |= {("only", step): (step,) for step in STEPS}
    for preset in ("compact", "best"):
        own = default_steps(preset, WIDEST_FOR_PREDICTIONS)
        for step in STEPS:
            change = "without" if step in own else "with"
            chosen[preset, change, step] = tuple(one for one in STEPS if (one in own) != (one == step))
    form = (*AWQ, "--preset", "compact", *COMPRESSED, "--symmetric", "--steps")
    methods = []
    for words, steps in chosen.items():
        able = [one for one in steps if one != "predictions" or "follow" in steps]
        if words[-1] in (*able, "none") or words[1:2] == ("without",):
            methods.append(
                Method(f"dsquant-{'-'.join(words)}", f"dsquant {' '.join(words)}", None, (*form, ",".join(able)))
            )
    return methods


def width_methods() -> list[Method]:
    """dsquant's presets at every width that compressed-tensors has, in both forms, and AutoRound below 4 bits."""
    widths = sorted(SAFETENSORS["compressed-tensors"].bits)
    autoround = [
        Method(
            f"{peer.name}-{bits}bit", f"{peer.label}, {bits} bits", "autoround", ("--bits", str(bits), *peer.options)
        )
        for peer in PEERS
        if peer.environment == "autoround"
        for bits in (2, 3)
    ]
    own = [
        Method(
            f"dsquant-{preset}-{form}-{bits}bit",
            f"{preset}, {form}, {bits} bits",
            None,
            ("awq", "--bits", str(bits), *AWQ[3:], "--preset", preset, *COMPRESSED, f"--{form}"),
        )
        for form in ("symmetric", "asymmetric")
        for preset in ("compact", "best")
        for bits in widths
    ]
    return [*autoround, *own]


def chosen_methods(names: Collection[str] | None, peers: Path) -> list[Method]:
    """The methods asked for by names or patterns, in the order of the table; without names dsquant's presets and every
    peer whose environment is in a folder.

    Raises:
        SystemExit: a name that there is no method for.
    """
    methods = [*PEERS, *own_methods()]
    if not names:
        return [one for one in methods if not one.environment or (peers / one.environment).exists()]
    methods += [*step_methods(), *width_methods()]
    unknown = {name for name in names if not any(fnmatch(one.name, name) for one in methods)}
    if unknown:
        raise SystemExit(f"no method {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in methods)}")
    return [one for one in methods if any(fnmatch(one.name, name) for name in names)]
