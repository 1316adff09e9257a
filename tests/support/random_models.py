"""Small random checkpoints of any architecture of transformers, as a release stores them, and its own forward of them.

Names and shapes are those of transformers' modules, the experts one by one; MTP layers, which it has none of, are
decoder layers with `MTP_PARTS`.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from checkpoints import random_weights, save_checkpoint, stored

from dsquant.formats.checkpoints import open_checkpoint

HEAD = "lm_head.weight"
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def _config(config: dict[str, Any], **changes: Any) -> Any:
    import transformers

    name = config["architectures"][0].removesuffix("ForCausalLM") + "Config"
    plain = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    return getattr(transformers, name).from_dict(plain | changes)


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a release, from transformers' modules."""
    import transformers

    decoder, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    types = {key: [*config[key], *["full"] * mtp] for key in ("indexer_types",) if key in config}
    with torch.device("meta"):
        built = _config(config, num_hidden_layers=decoder + mtp, **types)
        model = transformers.AutoModelForCausalLM.from_config(built)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        fused = _FUSED.fullmatch(name)
        if name == HEAD and config["tie_word_embeddings"]:
            continue
        if fused is None:
            found[name] = tuple(tensor.shape)
            continue
        linears = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        for expert in range(tensor.shape[0]):
            for linear in linears:
                found[f"{fused[1]}.{expert}.{linear}.weight"] = (tensor.shape[1] // len(linears), tensor.shape[2])
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    for layer in range(decoder, decoder + mtp):
        prefix = f"model.layers.{layer}"
        found |= dict.fromkeys(
            (f"{prefix}.{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")), (hidden,)
        )
        tables = (f"{prefix}.{name}.weight" for name in ("embed_tokens", "shared_head.head"))
        found |= dict.fromkeys(tables, (vocabulary, hidden))
        found[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
    return found


def make_random(folder: Path, config: dict[str, Any], seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint in BF16."""
    config = {**config, **changes, "torch_dtype": "bfloat16"}
    return save_checkpoint(folder, config, stored(random_weights(shapes_of(config), seed), fp8=False))


def random_module(config: dict[str, Any]) -> Any:
    """transformers' whole model in float32, its weights at random."""
    import transformers

    return transformers.AutoModelForCausalLM.from_config(
        _config(config), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def whole_logits(folder: Path, tokens_NT: torch.Tensor) -> torch.Tensor:
    """What transformers' whole model in float32 makes of a checkpoint's tokens: float32 [N, T, V]."""
    config, weights = json.loads((folder / "config.json").read_text()), open_checkpoint(folder).weights
    model = random_module(config)
    state = {}
    for name, tensor in model.state_dict().items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            tied = name == HEAD and config["tie_word_embeddings"]
            state[name] = weights["model.embed_tokens.weight" if tied else name]
            continue
        linears = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        experts = range(tensor.shape[0])
        parts = [[weights[f"{fused[1]}.{expert}.{linear}.weight"] for linear in linears] for expert in experts]
        state[name] = torch.stack([torch.cat(part) for part in parts])
    model.load_state_dict(state)
    with torch.no_grad():
        return model(tokens_NT).logits
