"""Quantizes with GPTQModel 7.7's GPTQ, symmetric 4 bits, in groups, from given tokens.

    python -m benchmarks.peers.gptqmodel MODEL TOKENS OUTPUT [--group-size 128] [--all-experts] [--mse 2.4]

Runs in GPTQModel's environment (README.md here), from the repository's root. MODEL is what `to_bf16 --dtype float32`
wrote. The recipe is its default (activation order inside the groups, damping 0.05 with automatic increase). An expert's
Hessian is of the tokens that the router sends it, or of all with `--all-experts` (`ExpertsRoutingBypass`).
"""

import argparse
import os
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.quantization.config import ExpertsRoutingBypass, GPTQConfig, MoEConfig

from benchmarks.peers.tokens import read_tokens


def quantize(
    model_folder: Path, tokens_NT: torch.Tensor, output: Path, group_size: int, all_experts: bool, mse: float
) -> None:
    """Quantizes the model with these very tokens and saves it in GPTQ's layout."""
    config = GPTQConfig(
        bits=4,
        group_size=group_size,
        mse=mse,
        moe=MoEConfig(ExpertsRoutingBypass()) if all_experts else None,
        device="cpu",
        offload_to_disk=False,
    )
    model_folder, output = model_folder.resolve(), output.resolve()
    os.chdir(output.parent)  # it writes a folder `logs` where it is started
    model = GPTQModel.load(str(model_folder), config, dtype=torch.float32)
    samples = [{"input_ids": sample.tolist(), "attention_mask": [1] * len(sample)} for sample in tokens_NT]
    model.quantize(samples, batch_size=8)
    model.save(str(output))


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--all-experts", action="store_true", help="every expert's Hessian from all tokens")
    parser.add_argument("--mse", type=float, default=0.0, help="exponent of the search for ranges; 0: none")
    arguments = parser.parse_args()
    tokens_NT = read_tokens(arguments.tokens)
    how = (arguments.group_size, arguments.all_experts, arguments.mse)
    quantize(arguments.model, tokens_NT, arguments.output, *how)


if __name__ == "__main__":
    main()
