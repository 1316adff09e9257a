"""Quantizes with ModelOpt 0.47's NVFP4, every linear, from given tokens.

    python -m benchmarks.peers.modelopt MODEL TOKENS OUTPUT [--search | --inputs]

Its preset W4A16_NVFP4 rounds plainly; with `--search` each block's scale is chosen among all of E4M3 by the output
error (`local_hessian`), as its preset for weights and activations has it, without the activations. With `--inputs` it
is its preset NVFP4, which rounds activations too.

Runs in ModelOpt's environment (README.md here), from the repository's root. MODEL is what `to_bf16 --dtype float32`
wrote.
"""

import argparse
import copy
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

from benchmarks.peers.tokens import read_tokens

TOKENS_AT_ONCE = 2048


def settings(search: bool, inputs: bool) -> dict:
    """ModelOpt's configuration, for weights alone but with `inputs`."""
    if inputs:
        return mtq.NVFP4_DEFAULT_CFG
    if not search:
        return mtq.W4A16_NVFP4_CFG
    found = copy.deepcopy(mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG)
    found["quant_cfg"] = [one for one in found["quant_cfg"] if "input_quantizer" not in one["quantizer_name"]]
    return found


def quantize(
    model_folder: Path, tokens_NT: torch.Tensor, output: Path, search: bool = False, inputs: bool = False
) -> None:
    """Quantizes the model with these very tokens and exports it in ModelOpt's layout."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    batches = tokens_NT.split(max(1, TOKENS_AT_ONCE // tokens_NT.shape[1]))

    @torch.no_grad()
    def run(model: torch.nn.Module) -> None:
        for batch in batches:
            model(batch, use_cache=False)

    model = mtq.quantize(model, settings(search, inputs), run)
    export_hf_checkpoint(model, export_dir=output)
    config = output / "config.json"
    told = json.loads(config.read_text())
    assert told.get("quantization_config", {}).get("quant_algo"), told.get("quantization_config")


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--search", action="store_true", help="choose scales by the output error")
    parser.add_argument("--inputs", action="store_true", help="round activations too")
    arguments = parser.parse_args()
    tokens_NT = read_tokens(arguments.tokens)
    quantize(arguments.model, tokens_NT, arguments.output, arguments.search, arguments.inputs)


if __name__ == "__main__":
    main()
