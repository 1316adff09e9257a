"""Puts strong outlier channels into every norm of a checkpoint, without changing its function; writes it in BF16.

    python benchmarks/outliers.py dsquant/assets/tiny-r1 /tmp/tiny-r1-outliers

Every gain is multiplied by a log-normal factor (sigma 1.5; every 32nd channel ten times that), and the columns of all
its consumers, the router among them, are divided by it. Large models have such channels; small ones do not.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsquant.formats.checkpoints import open_checkpoint

CONSUMERS = {
    "input_layernorm": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
    "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
    "post_attention_layernorm": ("gate_proj", "up_proj", "mlp.gate"),
}
SIGMA = 1.5


def main(source: Path, target: Path) -> None:
    """Reads, scales, writes."""
    checkpoint = open_checkpoint(source)
    weights = {name: checkpoint.weights[name] for name in checkpoint.weights}
    generator = torch.Generator().manual_seed(0)
    layers = checkpoint.config["num_hidden_layers"] + checkpoint.config.get("num_nextn_predict_layers", 0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm, consumers in CONSUMERS.items():
            gain = weights[f"{prefix}{norm}.weight"]
            factor = torch.exp(SIGMA * torch.randn(len(gain), generator=generator))
            factor[torch.randperm(len(gain), generator=generator)[: len(gain) // 32]] *= 10
            factor = (gain * factor).to(torch.bfloat16).float() / gain  # the gain stays exact in its storage type
            weights[f"{prefix}{norm}.weight"] = gain * factor
            for name in weights:
                if name.startswith(prefix) and name.removesuffix(".weight").endswith(consumers):
                    weights[name] = weights[name] / factor
    target.mkdir(parents=True)
    stored = {
        name: weight if name.endswith("e_score_correction_bias") else weight.to(torch.bfloat16)
        for name, weight in weights.items()
    }
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, target / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    main(given.source, given.target)
