"""Times coordinate descent on R1's shapes on a GPU: with groups moved by PyTorch, and by the Triton kernel.

    python -m benchmarks.descent

Prints milliseconds of a whole descent (four sweeps, groups of 128) and the error that it leaves, of Gaussian weights
and correlated inputs. Figures: docs/decisions/0015-the-quantized-model-is-followed.md.
"""

import time
from collections.abc import Callable

import torch

from dsquant.kernels.descent import descend_block, descend_block_reference
from dsquant.kernels.losses import gram_losses
from dsquant.quantization import descend
from dsquant.schemes import Grid, QuantizedWeight, round_to_nearest

SHAPES = {"gate": (2048, 7168), "down": (7168, 2048)}
TOKENS = 8192


def milliseconds(work: Callable[[], QuantizedWeight], repeats: int) -> tuple[float, QuantizedWeight]:
    """The least time of several runs behind a first one, and the result."""
    result, least = work(), float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - started)
    return 1e3 * least, result


def main() -> None:
    """Prints a row for each shape and grid."""
    torch.manual_seed(0)
    print("| weight | grid | groups by | ms | error left |")
    print("|---|---|---|---|---|")
    for name, (rows, columns) in SHAPES.items():
        weight_OI = torch.randn(rows, columns, device="cuda")
        inputs_RI = torch.randn(TOKENS, columns, device="cuda")
        inputs_RI[:, 1:] += inputs_RI[:, :-1].clone()
        gram_II = inputs_RI.T @ inputs_RI / TOKENS + 0.01 * torch.eye(columns, device="cuda")
        for symmetric in (True, False):
            start = round_to_nearest(weight_OI, Grid(4, 128, symmetric))
            for how, groups, repeats in (("PyTorch", descend_block_reference, 1), ("Triton", descend_block, 3)):
                descend.descend_block = groups
                spent, found = milliseconds(lambda: descend.descended_weight(start, weight_OI, gram_II), repeats)  # noqa: B023
                error = float(gram_losses(found.difference(weight_OI), gram_II).sum())
                print(f"| {name} | {'symmetric' if symmetric else 'asymmetric'} | {how} | {spent:.1f} | {error:.1f} |")


if __name__ == "__main__":
    main()
