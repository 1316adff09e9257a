"""Quantizes with llm-compressor 0.14's AWQ, symmetric 4 bits, groups of 128, every linear, from given tokens.

    python -m benchmarks.peers.llmcompressor MODEL TOKENS OUTPUT [--gptq] [--scheme NVFP4A16] [--no-awq]

With `--gptq` the rounding after AWQ's scales is its GPTQ, with its defaults (static activation order); `--scheme` takes
another of its schemes, `--no-awq` leaves AWQ out.

Runs in llm-compressor's environment (README.md here), from the repository's root: started by its path, this
file would shadow the package of the same name. MODEL is what `to_bf16 --dtype float32` wrote. The mappings
registered for DeepseekV3ForCausalLM raise on a model with dense layers, so each layer's are written out here;
the router is among the consumers of `post_attention_layernorm`, DeepSeek-V3.2's indexer among those of
`input_layernorm`. All else is llm-compressor's.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, DeepseekV3Config

from benchmarks.peers.tokens import read_tokens

TOKENS_AT_ONCE = 2048
SCHEMES = ("W4A16", "NVFP4A16", "NVFP4")


def attention_mappings(layer: str, has_indexer: bool) -> list[AWQMapping]:
    """The scale groups of one layer's attention.

    The indexer reads q_a_layernorm too, so that the smallest module around its readers is the one around
    input_layernorm's, and of two such mappings 0.14.0.1 raises a KeyError in the second: there it is left out.
    """
    attention = f"{layer}.self_attn"
    inputs = [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"]
    kv_a = AWQMapping(f"{attention}.kv_a_layernorm", [f"{attention}.kv_b_proj"])
    if has_indexer:
        inputs += [f"{attention}.indexer.wk", f"{attention}.indexer.weights_proj"]
        return [AWQMapping(f"{layer}.input_layernorm", inputs), kv_a]
    q_a = AWQMapping(f"{attention}.q_a_layernorm", [f"{attention}.q_b_proj"])
    return [AWQMapping(f"{layer}.input_layernorm", inputs), q_a, kv_a]


def mlp_mappings(layer: str, routed_experts: int) -> list[AWQMapping]:
    """The scale groups of one layer's MLP; `routed_experts` is 0 in a dense layer."""
    experts = [f"{layer}.mlp.experts.{index}" for index in range(routed_experts)]
    branches = [*experts, f"{layer}.mlp.shared_experts"] if experts else [f"{layer}.mlp"]
    router = [f"{layer}.mlp.gate"] if experts else []
    consumers = [f"{branch}.{projection}" for branch in branches for projection in ("gate_proj", "up_proj")]
    return [
        AWQMapping(f"{layer}.post_attention_layernorm", router + consumers),
        *(AWQMapping(f"{branch}.up_proj", [f"{branch}.down_proj"]) for branch in branches),
    ]


def mappings(config: DeepseekV3Config) -> list[AWQMapping]:
    """The scale groups of every layer, by exact module names."""
    groups = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        routed_experts = config.n_routed_experts if index >= config.first_k_dense_replace else 0
        groups += attention_mappings(layer, config.model_type == "deepseek_v32") + mlp_mappings(layer, routed_experts)
    return groups


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded."""

    scheme: str = "W4A16"
    awq: bool = True
    """Whether AWQ's scales are folded in before."""
    gptq: bool = False

    def modifiers(self, config: DeepseekV3Config) -> list[Modifier]:
        """llm-compressor's recipe."""
        rounding = GPTQModifier if self.gptq else QuantizationModifier
        rounded = rounding(targets=["Linear"], scheme=self.scheme, ignore=["lm_head", "re:.*indexer.*"])
        return [AWQModifier(mappings=mappings(config)), rounded] if self.awq else [rounded]


def quantize(model_folder: Path, tokens_NT: torch.Tensor, output: Path, how: Rounding) -> None:
    """Quantizes the model with these very tokens and saves it in compressed-tensors' layout."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # raises where there is no accelerator
    # Not `with load_quantizable_moe()`: it lists all of transformers' modules and so needs torchvision.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    data = Dataset.from_dict({"input_ids": tokens_NT.tolist(), "attention_mask": torch.ones_like(tokens_NT).tolist()})
    oneshot(
        model=model,
        dataset=data,
        recipe=how.modifiers(model.config),
        batch_size=max(1, TOKENS_AT_ONCE // tokens_NT.shape[1]),
        num_calibration_samples=len(data),
        max_seq_length=tokens_NT.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(output, save_compressed=True)


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--gptq", action="store_true", help="round with GPTQ after AWQ's scales")
    parser.add_argument("--scheme", choices=SCHEMES, default="W4A16")
    parser.add_argument("--no-awq", action="store_true", help="fold no scales")
    arguments = parser.parse_args()
    how = Rounding(arguments.scheme, not arguments.no_awq, arguments.gptq)
    quantize(arguments.model, read_tokens(arguments.tokens), arguments.output, how)


if __name__ == "__main__":
    main()
