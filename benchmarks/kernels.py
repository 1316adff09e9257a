"""Times every kernel on an NVIDIA GPU: the PyTorch reference and the Triton twin, on DeepSeek-R1's shapes.

    python -m benchmarks.kernels

Prints Markdown: medians by GPU events, and the share of this card's copy bandwidth (for kernels that only move bytes)
or bfloat16 matrix product rate (for those that multiply), both measured first in the same run. Products with 4-bit
weights stand beside autoawq's Triton kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from awq.modules.triton.gemm import awq_dequantize_triton, awq_gemm_triton
from triton.testing import do_bench, do_bench_cudagraph

from benchmarks import w4a16_triton
from dsquant.kernels import (
    clipping,
    clipping_triton,
    compensation,
    compensation_triton,
    fp8,
    fp8_triton,
    grids,
    losses,
    losses_triton,
    packing,
    packing_triton,
    rounding_triton,
)
from dsquant.schemes import CLIP_RATIOS, Grid, round_to_nearest

HIDDEN, INTERMEDIATE = 7168, 2048
GROUP, BITS = 128, 4
LEVELS = Grid(BITS, GROUP, True).levels
# Together larger than the second-level cache.
WEIGHTS = 10


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    name: str
    shape: str
    triton: Callable[[], object]
    reference: Callable[[], object]
    moved_bytes: int = 0
    """The fewest bytes it must read and write."""
    operations: int = 0
    """Multiplications and additions of the matrix product it stands for."""


def median_ms(run: Callable[[], object]) -> float:
    """The median time of a call on the GPU with a cold cache, in milliseconds, short calls' launches included."""
    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


def replayed_ms(runs: Sequence[Callable[[], object]]) -> float:
    """The median time of calls on different weights, replayed from a CUDA graph, by the number of calls."""
    return float(do_bench_cudagraph(lambda: [run() for run in runs], rep=10, return_mode="median")) / len(runs)


def searches() -> Iterator[Case]:
    """Compensation of one group of down_proj, and the clip search of gate_proj."""
    weight_SO = torch.randn(GROUP, HIDDEN, device="cuda")
    factor_SS = torch.linalg.cholesky(_gram(GROUP).double(), upper=True).float()
    candidates = grids.range_parameters(weight_SO.T, GROUP, LEVELS, CLIP_RATIOS)
    compensated = (weight_SO, factor_SS, candidates, LEVELS)
    yield Case(
        "compensate_group",
        f"[{GROUP}, {HIDDEN}], 10 clip ratios",
        lambda: compensation_triton.compensate_group(*compensated),
        lambda: compensation.compensate_group_reference(*compensated),
    )
    weight_OI = torch.randn(INTERMEDIATE, HIDDEN, device="cuda")
    grams_GSS = torch.stack([_gram(GROUP) for _ in range(HIDDEN // GROUP)])
    clipped = (weight_OI, grams_GSS, grids.range_parameters(weight_OI, GROUP, LEVELS, CLIP_RATIOS), LEVELS)
    yield Case(
        "clip_losses",
        f"[{INTERMEDIATE}, {HIDDEN}], 10 clip ratios",
        lambda: clipping_triton.clip_losses(*clipped),
        lambda: clipping.clip_losses_reference(*clipped),
        operations=2 * weight_OI.numel() * GROUP * len(CLIP_RATIOS),
    )
    gram_II = _gram(HIDDEN)
    yield Case(
        "gram_losses",
        f"[{INTERMEDIATE}, {HIDDEN}]",
        lambda: losses_triton.gram_losses(weight_OI, gram_II),
        lambda: losses.gram_losses_reference(weight_OI, gram_II),
        operations=2 * weight_OI.numel() * HIDDEN,
    )
    wide_OI, small_II = weight_OI.view(HIDDEN, INTERMEDIATE), _gram(INTERMEDIATE)
    yield Case(
        "gram_losses",
        f"[{HIDDEN}, {INTERMEDIATE}]",
        lambda: losses_triton.gram_losses(wide_OI, small_II),
        lambda: losses.gram_losses_reference(wide_OI, small_II),
        operations=2 * weight_OI.numel() * INTERMEDIATE,
    )


def single_passes() -> Iterator[Case]:
    """What reads a weight once and writes it once."""
    shape = f"[{INTERMEDIATE}, {HIDDEN}]"
    weight_OI = torch.randn(INTERMEDIATE, HIDDEN, device="cuda")
    size = weight_OI.numel()
    rounded = (weight_OI, GROUP, LEVELS)
    yield Case(
        "round_to_range",
        shape,
        lambda: rounding_triton.round_to_range(*rounded),
        lambda: grids.round_to_range_reference(*rounded),
        moved_bytes=5 * size,
    )
    scaled = (weight_OI, torch.rand(1, HIDDEN, device="cuda") + 0.5, GROUP, LEVELS)
    yield Case(
        "fake_quantize_difference",
        shape,
        lambda: rounding_triton.fake_quantize_difference(*scaled),
        lambda: grids.fake_quantize_difference_reference(*scaled),
        moved_bytes=8 * size,
    )
    codes_OI, _ = grids.round_to_range(*rounded)
    yield Case(
        "pack_awq",
        shape,
        lambda: packing_triton.pack_awq(codes_OI),
        lambda: packing.pack_awq_reference(codes_OI),
        moved_bytes=size * 3 // 2,
    )
    yield Case(
        "pack_rows",
        shape,
        lambda: packing_triton.pack_rows(codes_OI, BITS),
        lambda: packing.pack_rows_reference(codes_OI, BITS),
        moved_bytes=size * 3 // 2,
    )
    stored_OI = weight_OI.to(torch.float8_e4m3fn)
    block_scales = torch.rand(INTERMEDIATE // 128, HIDDEN // 128, device="cuda")
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        stored = (stored_OI, block_scales, (128, 128), dtype)
        yield Case(
            f"dequantize_fp8 to {str(dtype).removeprefix('torch.')}",
            shape,
            lambda stored=stored: fp8_triton.dequantize_fp8(*stored),
            lambda stored=stored: fp8.dequantize_fp8_reference(*stored),
            moved_bytes=(1 + width) * size,
        )


@dataclass(frozen=True)
class Product:
    """One product with a 4-bit weight."""

    rows: int
    """Of x."""
    shape: tuple[int, int]
    """[O, I]."""
    runs: dict[str, list[Callable[[], object]]]
    """Column of the table -> what is timed, a call for each of several weights that no cache holds together."""


def products() -> Iterator[Product]:
    """gate_proj and down_proj of an expert, from one token to a long text, beside autoawq's two ways (float16)."""
    for shape in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        weights = [_packed_weight(*shape) for _ in range(WEIGHTS)]
        for rows in (1, 16, 64, 128, 256, 1024, 8192):
            single_MI = torch.randn(rows, shape[1], device="cuda")
            half_MI, brain_MI = single_MI.half(), single_MI.bfloat16()
            runs: dict[str, list[Callable[[], object]]] = {
                "autoawq gemm": [partial(awq_gemm_triton, half_MI, *peer, split_k_iters=8) for peer, _, _ in weights],
                "autoawq dequantize + matmul": [
                    partial(_dequantized_product, half_MI, *peer) for peer, _, _ in weights
                ],
                "awq f16": [partial(w4a16_triton.matmul_awq, half_MI, *awq) for _, awq, _ in weights],
                "awq bf16": [partial(w4a16_triton.matmul_awq, brain_MI, *awq) for _, awq, _ in weights],
                "awq f32": [partial(w4a16_triton.matmul_awq, single_MI, *awq) for _, awq, _ in weights],
                "pack-quantized f16": [
                    partial(w4a16_triton.matmul_pack_quantized, half_MI, *dense) for _, _, dense in weights
                ],
            }
            yield Product(rows, shape, runs)


def _packed_weight(rows: int, columns: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    """A rounded weight as autoawq's Triton functions take it, and in AWQ's and in compressed-tensors' layout."""
    rounded = round_to_nearest(torch.randn(rows, columns, device="cuda"), Grid(BITS, GROUP, True))
    qweight, qzeros = (packing.pack_awq(part) for part in (rounded.codes_OI, rounded.zero_points_OG))
    scales_GO = rounded.scales_OG.T.half().contiguous()
    dense = (packing.pack_rows(rounded.codes_OI, BITS), rounded.scales_OG.bfloat16())
    return (qweight, scales_GO, qzeros), (qweight, qzeros, scales_GO), dense


def _dequantized_product(inputs_MI: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    return inputs_MI @ awq_dequantize_triton(*tensors)


def print_products(cases: Iterator[Product], copied: float, multiplied: float) -> None:
    """A line for each case; the limit is the time of its operations or of its bytes, whichever is longer."""
    header = True
    for case in cases:
        if header:
            print(f"\n| x rows | [O, I] | {' ms | '.join(case.runs)} ms | limit ms |")
            print("|---" * (len(case.runs) + 3) + "|")
            header = False
        times = " | ".join(f"{replayed_ms(runs):.4f}" for runs in case.runs.values())
        size = case.shape[0] * case.shape[1]
        moved_bytes = size // 2 + 2 * case.rows * sum(case.shape)
        limit_ms = max(2 * case.rows * size / multiplied, moved_bytes / copied) * 1e3
        print(f"| {case.rows} | {list(case.shape)} | {times} | {limit_ms:.4f} |", flush=True)


def _gram(width: int) -> torch.Tensor:
    inputs_RI = torch.randn(2 * width, width, device="cuda")
    return inputs_RI.T @ inputs_RI / len(inputs_RI)


def copy_rate() -> float:
    """Bytes read and written each second by a large copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def product_rate() -> float:
    """Operations each second of a large bfloat16 matrix product."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: left @ right) * 1e3


def print_table(cases: Iterator[Case], copied: float, multiplied: float) -> None:
    """A line for each case."""
    print("| kernel | shape | PyTorch ms | Triton ms | times faster | share of the limit |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        reference_ms, triton_ms = median_ms(case.reference), median_ms(case.triton)
        share = "-"
        if case.moved_bytes:
            share = f"{case.moved_bytes / copied * 1e3 / triton_ms:.0%} of the copy rate"
        elif case.operations:
            share = f"{case.operations / multiplied * 1e3 / triton_ms:.0%} of the product rate"
        times = f"{reference_ms:.3f} | {triton_ms:.3f} | {reference_ms / triton_ms:.1f}"
        print(f"| {case.name} | {case.shape} | {times} | {share} |", flush=True)


def main() -> None:
    """Prints the tables."""
    torch.manual_seed(0)
    copied, multiplied = copy_rate(), product_rate()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}")
    print(f"copy {copied / 1e12:.2f} TB/s, bfloat16 product {multiplied / 1e12:.0f} TFLOP/s\n")
    print_table(searches(), copied, multiplied)
    print_table(single_passes(), copied, multiplied)
    print_products(products(), copied, multiplied)


if __name__ == "__main__":
    main()
