"""What dsquant's stages cost a weight on one core: the rates that `dsquant plan` forecasts hours with.

    python -m benchmarks.planning

Times the processor, not the clock, on one expert of R1's shape, so that it can be run on a busy machine.
"""

import argparse
import hashlib
import time
from collections.abc import Callable

import torch

from dsquant.formats.awq_gemm import AwqGemm
from dsquant.formats.gguf.store import stored_rows
from dsquant.kernels.fp8 import dequantize_fp8
from dsquant.quantization.clip import clipped_weight
from dsquant.quantization.compensate import compensated_weight, with_inverses
from dsquant.quantization.statistics import InputStatistics
from dsquant.schemes import Grid, QuantizedWeight
from dsquant.source.scan import all_finite

WIDTH, HIDDEN = 2048, 7168
TOKENS = 384  # what an expert of R1 gets of 24 samples of 512 tokens


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Processor seconds of the fastest of some runs."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    """Prints one line for each stage."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5
    stored, scales = (weight * 100).to(torch.float8_e4m3fn), torch.full((WIDTH // 128, HIDDEN // 128), 0.01)
    tokens = torch.randn(TOKENS, HIDDEN)
    raw = memoryview(stored.view(torch.uint8).flatten().numpy().data)
    grid = Grid(4, 128, False)
    codes = torch.randint(0, 16, (WIDTH, HIDDEN), dtype=torch.uint8)
    packed_scales = torch.full((WIDTH, HIDDEN // 128), 0.01)
    quantized = QuantizedWeight(codes, packed_scales, torch.full(packed_scales.shape, 8, dtype=torch.uint8), grid)
    statistics = InputStatistics(HIDDEN, 0, compensated=True)
    statistics.add(torch.randn(1100, HIDDEN))
    moments = with_inverses(statistics.moments(), grid)
    importance = torch.rand(HIDDEN) + 0.1
    stages = {
        "scan: SHA-256 and no NaN, FP8": lambda: (hashlib.sha256(raw), all_finite(stored)),
        "read: FP8 to float32": lambda: dequantize_fp8(stored, scales, (128, 128)),
        f"run: {TOKENS} tokens": lambda: tokens @ weight.T,
        "clip: 1100 tokens": lambda: clipped_weight(weight, grid, moments),
        "clip and compensate: 1100 tokens": lambda: compensated_weight(weight, grid, moments),
        "pack: AWQ": lambda: AwqGemm().pack("linear", quantized),
        "store: Q4_K by ggml, weighted": lambda: stored_rows(weight, "Q4_K", importance),
        "store: Q6_K by ggml, weighted": lambda: stored_rows(weight, "Q6_K", importance),
        "store: Q8_0 by ggml, weighted": lambda: stored_rows(weight, "Q8_0", importance),
    }
    for name, work in stages.items():
        print(f"{name:34} {seconds(work) / weight.numel():.2e} s a weight")


if __name__ == "__main__":
    main()
