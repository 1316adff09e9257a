"""Quantizes with AutoRound 0.16's sign gradient descent, in groups, from given tokens.

    python -m benchmarks.peers.autoround MODEL TOKENS OUTPUT [--bits 4] [--iters 200] [--group-size 128] \\
        [--asymmetric] [--awq] [--device cuda]

Runs in AutoRound's environment (README.md here). MODEL is what `to_bf16 --dtype float32` wrote. The recipe is its
default: 200 steps for each decoder layer, rounding offsets and ranges learned, inputs from the layers already
quantized, the best step kept. Everything is computed in float32 (`amp=False`): a CPU is faster so, and no worse.
torch.compile is off: it compiles each layer anew, which takes longer than the steps of a small one.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.tokens import read_tokens

BATCH_SIZE = 8


def quantize(options: argparse.Namespace) -> None:
    """Quantizes the model with these very tokens and saves it in GPTQ's layout."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokens_NT = read_tokens(options.tokens)
    quantizer = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        scheme=f"W{options.bits}A16",
        group_size=options.group_size,
        sym=not options.asymmetric,
        alg_configs=[*([AWQConfig(skip_moe=False)] if options.awq else []), SignRoundConfig(iters=options.iters)],
        dataset=list(tokens_NT.split(BATCH_SIZE)),
        nsamples=len(tokens_NT),
        seqlen=tokens_NT.shape[1],
        batch_size=BATCH_SIZE,
        amp=False,
        enable_torch_compile=False,
        scale_dtype="fp32",
        device_map=options.device,
    )
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        quantizer.quantize_and_save(folder, format="auto_gptq")
        [made] = Path(folder).iterdir()  # it names a folder inside the one that it is given
        made.rename(options.output)


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--iters", type=int, default=200, help="steps for each decoder layer")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--awq", action="store_true", help="its AWQ first")
    parser.add_argument("--device", default="cpu")
    quantize(parser.parse_args())


if __name__ == "__main__":
    main()
