"""Quantizes with AutoAWQ 0.2.9's own quantizer, 4 bits, groups of 128, zero points, from given tokens.

    python -m benchmarks.peers.autoawq MODEL TOKENS OUTPUT

Runs in AutoAWQ's environment (README.md here). MODEL is what `to_bf16 --dtype float32` wrote. The search, the
scale groups, the clipping and the packing are AutoAWQ's; only its data loader is replaced, since it drops,
joins and cuts samples, and on a CPU its backup of the weights is made a real one (`CpuSafeQuantizer`).
"""

import argparse
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.quantize import quantizer

from benchmarks.peers.tokens import read_tokens

QUANT_CONFIG = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


class CpuSafeQuantizer(quantizer.AwqQuantizer):
    """AutoAWQ's quantizer, doing on a CPU what it does on a GPU.

    `_compute_best_scale` keeps the weights with `{k: v.cpu() for k, v in module.state_dict().items()}`, which
    copies from a GPU but on a CPU is the weights themselves. The first candidate's `weight.mul_(scales)` then
    goes into the backup too, and every scaled linear ends up multiplied by that candidate's scales, which
    nothing undoes.
    """

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
        state_dict = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: value.clone() for name, value in state_dict().items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
        finally:
            del module2inspect.state_dict


def quantize(model_folder: Path, tokens_NT: torch.Tensor, output: Path, unpatched: bool = False) -> None:
    """Quantizes the model with these very tokens and saves it as AWQ GEMM.

    Args:
        model_folder: a checkpoint without quantization.
        tokens_NT: int64 [N, T].
        output: where the quantized checkpoint goes.
        unpatched: leave AutoAWQ's backup of the weights as it is, to show what that does on a CPU.
    """
    model = AutoAWQForCausalLM.from_pretrained(str(model_folder), torch_dtype=torch.float32, device_map="cpu")
    samples = [sample.unsqueeze(0) for sample in tokens_NT]
    quantizer.get_calib_dataset = lambda **_: samples
    model.quantize(
        tokenizer=None,
        quant_config=QUANT_CONFIG,
        max_calib_samples=len(samples),
        max_calib_seq_len=tokens_NT.shape[1],
        quantizer_cls=quantizer.AwqQuantizer if unpatched else CpuSafeQuantizer,
    )
    model.save_quantized(str(output))


def main() -> None:
    """Parses the command line and quantizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--unpatched", action="store_true", help="keep AutoAWQ's error on CPUs")
    arguments = parser.parse_args()
    quantize(arguments.model, read_tokens(arguments.tokens), arguments.output, arguments.unpatched)


if __name__ == "__main__":
    main()
