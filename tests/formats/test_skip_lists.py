"""Skip lists: which modules each engine leaves unquantized, by its own rules."""

import re

import pytest

from dsquant.formats.skip_lists import ignored_modules, skipped_modules


def modules() -> dict[str, list[str]]:
    """Linears of a small R1 by kind; layer 1 and layers 10 to 12 are there because their names begin alike."""
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    parts = ("gate_proj", "up_proj", "down_proj")
    found: dict[str, list[str]] = {"attention": [], "kv_b": [], "dense": [], "shared": [], "routed": [], "mtp": []}
    for layer in range(14):
        prefix = f"model.layers.{layer}"
        names = {"attention": [f"{prefix}.self_attn.{part}" for part in attention]}
        names["kv_b"] = [f"{prefix}.self_attn.kv_b_proj"]
        if layer < 2:
            names["dense"] = [f"{prefix}.mlp.{part}" for part in parts]
        else:
            names["shared"] = [f"{prefix}.mlp.shared_experts.{part}" for part in parts]
            names["routed"] = [f"{prefix}.mlp.experts.{e}.{part}" for e in range(11) for part in parts]
        for kind, linears in names.items():
            found["mtp" if layer == 13 else kind] += linears
    return found


@pytest.mark.parametrize(
    "quantized",
    [
        ("routed",),
        ("attention", "dense", "shared", "routed"),
        ("attention", "dense", "shared", "routed", "mtp"),
        ("attention", "kv_b", "dense", "shared", "routed"),
    ],
)
def test_every_engine_skips_exactly_what_is_not_quantized(quantized: tuple[str, ...]) -> None:
    linears = {name: kind in quantized for kind, names in modules().items() for name in names}
    skipped, ignored = skipped_modules(linears), ignored_modules(linears)
    router = [f"model.layers.{layer}.mlp.gate" for layer in range(2, 14)]
    unquantized = {**linears, **dict.fromkeys(["lm_head", "model.layers.13.eh_proj", *router], False)}
    for name, is_quantized in unquantized.items():
        vllm = any(entry in name for entry in skipped)
        transformers = any(re.match(entry, name) or name.endswith(entry) for entry in skipped)
        compressed = any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignored)
        assert vllm == transformers == compressed == (not is_quantized), name
    for name, is_quantized in linears.items():  # the names that engines give to fused layers
        for part, fused in (("gate_proj", "gate_up_proj"), ("q_a_proj", "fused_qkv_a_proj")):
            if name.endswith(part) and ".experts." not in name:
                assert any(entry in name.replace(part, fused) for entry in skipped) == (not is_quantized), name


@pytest.mark.parametrize("quantized", [False, True])
def test_a_draft_layer_is_skipped_under_the_name_that_sglang_gives_it(quantized: bool) -> None:
    kinds = ("attention", "dense", "shared", "routed", *(("mtp",) if quantized else ()))
    linears = {name: kind in kinds for kind, names in modules().items() for name in names}
    skipped = skipped_modules(linears, "model.layers.13")
    for name, is_quantized in linears.items():
        for own in (name, name.replace("model.layers.13.", "model.decoder.")):
            assert any(entry in own for entry in skipped) == (not is_quantized), own


def test_a_fused_layer_is_skipped_by_its_own_name_where_its_parts_are() -> None:
    skipped_parts = [f"model.layers.4.self_attn.{part}" for part in ("q_a_proj", "kv_a_proj_with_mqa")]
    skipped_parts += [f"model.layers.5.mlp.shared_experts.{part}" for part in ("gate_proj", "up_proj")]
    linears = {name: name not in skipped_parts for names in modules().values() for name in names}
    skipped = skipped_modules(linears)
    for layer in range(2, 14):
        for module, skipping in (("self_attn.fused_qkv_a_proj_with_mqa", 4), ("mlp.shared_experts.gate_up_proj", 5)):
            name = f"model.layers.{layer}.{module}"
            assert any(entry in name for entry in skipped) == (layer == skipping), name
