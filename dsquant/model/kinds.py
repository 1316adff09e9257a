"""Names the part of a network that a tensor belongs to, by its name in a checkpoint or in a GGUF file."""

import re

# In the order in which names are tried: `.mlp.` and `.ffn_` are dense MLPs where nothing before them fits.
_MARKS = {
    "routed experts": (".mlp.experts.", ".switch_mlp.", "_exps."),
    "shared experts": (".shared_experts.", "_shexp."),
    "router": (".mlp.gate.", ".ffn_gate_inp.", ".exp_probs_b."),
    "norms": ("norm.",),
    "dense MLP": (".mlp.", ".ffn_"),
    "attention": (".self_attn.", ".attn_"),
    "embedding": ("embed_tokens", "token_embd"),
    "head": ("lm_head", "output."),
}
KINDS = (*_MARKS, "MTP")
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")


def kind_of(name: str, num_layers: int) -> str:
    """Returns which of `KINDS` a tensor belongs to; layers behind the decoder's are for multi-token prediction."""
    layer = _LAYER.match(name)
    if layer is not None and int(layer[1]) >= num_layers:
        return "MTP"
    return next((kind for kind, marks in _MARKS.items() if any(mark in name for mark in marks)), "norms")
