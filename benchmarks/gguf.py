"""Speed and error of every GGUF quantizer: MB/s of float32 input, on one core, on all cores, on a GPU.

    python -m benchmarks.gguf [--rows 512] [--repeats 3] [--types IQ2_XXS IQ3_S]

prints a table in Markdown. Each number is the best of several runs on Gaussian rows of R1's width with random
importances; on one core, of the seconds that the core worked. The error is the root of the weighted mean square, beside
that of ggml's quantizer on the same rows, by the weights that ggml gives a column. AutoRound's torch packer is measured
too where the package `auto_round` can be imported.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from dsquant.kernels import code_book_search, code_books, ggml, k_quants

COLUMNS = 7168  # of most of R1's weights
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", *code_books.TYPES)
WITH_KERNELS = (*k_quants.ROW_BLOCKS, *code_books.TYPES)
Quantizer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    type_name: str
    quantizer: str
    place: str
    """One core, all cores, or the GPU."""
    megabytes_s: float
    error: float


def quantizers(type_name: str, place: str) -> Iterator[tuple[str, Quantizer]]:
    """What can quantize to a type at a place.

    Args:
        type_name: the type.
        place: `one core`, `all cores`, `GPU`, or `GPU, host to host`.

    Yields:
        Name and function of rows and importances.
    """
    if place == "GPU, host to host":
        if type_name in WITH_KERNELS:
            from dsquant.formats.gguf.store import stored_rows

            yield "dsquant Triton", lambda rows, weights: stored_rows(rows.cuda(), type_name, weights).cpu()
        return
    if place == "GPU" and type_name in WITH_KERNELS:
        from dsquant.kernels import code_books_triton, k_quants_triton

        kernels = code_books_triton if type_name in code_books.TYPES else k_quants_triton
        yield "dsquant Triton", lambda rows, weights: kernels.quantize(rows, type_name, weights)
    if place != "GPU" and ggml.library() is not None:
        threads = 1 if place == "one core" else 0
        yield "ggml", lambda rows, weights: ggml.quantize(rows, type_name, weights, threads)
    if place != "GPU" and type_name in WITH_KERNELS:
        reference = code_book_search if type_name in code_books.TYPES else k_quants
        yield "dsquant PyTorch", lambda rows, weights: reference.quantize(rows, type_name, weights)
    if place == "one core" and type_name in ("Q8_0", "Q4_0", "Q5_0"):
        number = gguf.GGMLQuantizationType[type_name]
        yield "gguf-py", lambda rows, _: torch.from_numpy(gguf.quants.quantize(rows.numpy(), number))
    if type_name in k_quants.ROW_BLOCKS and _has_auto_round():
        from auto_round.export.export_to_gguf.block_bytes import ggml_quant

        def by_auto_round(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            stored = ggml_quant(rows.clone(), type_name.lower(), imatrix=weights, device=rows.device.type)
            return torch.from_numpy(np.asarray(stored))

        yield "AutoRound", by_auto_round


@cache
def _has_auto_round() -> bool:
    try:
        import auto_round.export.export_to_gguf.block_bytes  # noqa: F401
    except ImportError:
        return False
    return True


def weighted_error(stored: torch.Tensor, type_name: str, rows_RI: torch.Tensor, importance_I: torch.Tensor) -> float:
    """Root of the weighted mean square error, relative to the rows, as gguf-py decodes them.

    Args:
        stored: uint8 [R, bytes of a row].
        type_name: their type.
        rows_RI: float32 [R, I], what they stand for.
        importance_I: float32 [I].

    Returns:
        The error.
    """
    raw = stored.cpu().numpy().reshape(len(rows_RI), -1)
    values_RI = torch.from_numpy(dequantize(raw, gguf.GGMLQuantizationType[type_name]).astype(np.float32))
    weights_RI = importance_I.expand_as(rows_RI)
    if type_name in ("Q4_K", "Q5_K", *code_books.TYPES):
        spread = code_books.TYPES[type_name].spread if type_name in code_books.TYPES else 2
        blocks = rows_RI.unflatten(1, (-1, 256)).square()
        weights_RI = weights_RI * (spread * blocks.mean(2, keepdim=True) + blocks).sqrt().flatten(1)
    return float(((weights_RI * (values_RI - rows_RI).square()).sum() / (weights_RI * rows_RI.square()).sum()).sqrt())


def best_seconds(run: Callable[[], object], repeats: int, place: str) -> float:
    """Seconds of the fastest of several runs, after one that warms up.

    Args:
        run: what to time.
        repeats: runs.
        place: as `quantizers` takes it; on one core the seconds are those that the core worked, so that other programs
            on the machine count little.

    Returns:
        Seconds.
    """
    clock = time.process_time if place == "one core" else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        started = clock()
        run()
        if place.startswith("GPU"):
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times[1:])


def measure(
    rows_RI: torch.Tensor, importance_I: torch.Tensor, place: str, repeats: int, types: Sequence[str] = TYPES
) -> Iterator[Measurement]:
    """Measures every quantizer at a place.

    Args:
        rows_RI: float32 [R, I], on the CPU.
        importance_I: float32 [I].
        place: as `quantizers` takes it.
        repeats: runs of each.
        types: the types.

    Yields:
        The measurements.
    """
    torch.set_num_threads(1 if place == "one core" else len(os.sched_getaffinity(0)))
    device = "cuda" if place == "GPU" else "cpu"
    rows, weights = rows_RI.to(device), importance_I.to(device)
    compared = min(64, len(rows_RI))
    for type_name in types:
        for name, quantizer in quantizers(type_name, place):
            seconds = best_seconds(lambda run=quantizer: run(rows, weights), repeats, place)
            stored = quantizer(rows[:compared], weights)
            error = weighted_error(stored, type_name, rows_RI[:compared], importance_I)
            yield Measurement(type_name, name, place, rows.numel() * 4 / seconds / 1e6, error)


def main() -> None:
    """Measures what this machine has, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows on the CPU")
    parser.add_argument("--gpu-rows", type=int, default=2**15, help="rows on the GPU: 0.9 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--places", nargs="*", default=["one core", "all cores", "GPU", "GPU, host to host"])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    importance_I = torch.randn(COLUMNS, generator=generator).exp()
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    )
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
    print("\n| type | quantizer | place | MB/s of float32 | weighted error | of ggml's |\n|---|---|---|---|---|---|")
    for place in options.places:
        if place.startswith("GPU") and not torch.cuda.is_available():
            continue
        num_rows = options.gpu_rows if place.startswith("GPU") else options.rows
        rows_RI = torch.randn(num_rows, COLUMNS, generator=generator) * 0.02
        for found in measure(rows_RI, importance_I, place, options.repeats, options.types):
            share = "-"
            if ggml.library() is not None:
                part_RI = rows_RI[:64]
                by_ggml = ggml.quantize(part_RI, found.type_name, importance_I)
                share = f"{found.error / weighted_error(by_ggml, found.type_name, part_RI, importance_I):.4f}"
            print(
                f"| {found.type_name} | {found.quantizer} | {found.place} | {found.megabytes_s:,.0f} "
                f"| {found.error:.5f} | {share} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
