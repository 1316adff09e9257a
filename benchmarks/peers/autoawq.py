"""Quantizes with AutoAWQ 0.2.9's own quantizer, 4 bits, groups of 128, zero points, from given tokens.

    python -m benchmarks.peers.autoawq MODEL TOKENS OUTPUT

Runs in AutoAWQ's environment (README.md here). MODEL is what `to_bf16 --dtype float32` wrote. The search, the scale
groups, the clipping and the packing are AutoAWQ's; only its data loader is replaced, since it drops, joins and cuts
samples.
"""

import argparse
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer

from benchmarks.peers.tokens import read_tokens

QUANT_CONFIG = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


def quantize(model_folder: Path, tokens_NT: torch.Tensor, output: Path) -> None:
    """Quantizes the model with these very tokens and saves it as AWQ GEMM."""
    model = AutoAWQForCausalLM.from_pretrained(str(model_folder), torch_dtype=torch.float32, device_map="cpu")
    samples = [sample.unsqueeze(0) for sample in tokens_NT]
    quantizer.get_calib_dataset = lambda **_: samples
    model.quantize(
        tokenizer=None,
        quant_config=QUANT_CONFIG,
        max_calib_samples=len(samples),
        max_calib_seq_len=tokens_NT.shape[1],
    )
    model.save_quantized(str(output))


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    quantize(arguments.model, read_tokens(arguments.tokens), arguments.output)


if __name__ == "__main__":
    main()
