"""What each step of the quantization gains on each scheme: relative output errors of one linear, from one run on a CPU.

    python -m benchmarks.schemes

Weights are Gaussian with columns of different sizes, inputs are correlated and their channels of different energy.
Errors are those of unseen inputs, ||X (Q - W)^T||^2 / ||X W^T||^2, in units of 1e-4.
Figures: docs/decisions/0022-a-scheme-says-what-a-group-may-be.md.
"""

import torch

from dsquant.quantization.statistics import InputStatistics
from dsquant.quantization.steps import rounded_weight
from dsquant.schemes import Grid, Scheme
from dsquant.schemes.floats import Mxfp4, Nvfp4
from dsquant.schemes.ggml_types import GGML_TYPES

ROWS, COLUMNS, TOKENS = 256, 1024, 8192
SCHEMES: dict[str, Scheme] = {
    "int4 g128 asymmetric": Grid(4, 128, False),
    "int4 g32 symmetric": Grid(4, 32, True),
    "NVFP4": Nvfp4(),
    "MXFP4": Mxfp4(),
    **GGML_TYPES,
}
STEPS = {
    "plain": (),
    "clip": ("clip",),
    "compensate": ("compensate",),
    "descend": ("descend",),
    "clip, compensate": ("clip", "compensate"),
    "all three": ("clip", "compensate", "descend"),
}


def main() -> None:
    """Prints a row for each scheme."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    energy_I = (0.7 * torch.randn(COLUMNS, generator=generator)).exp()
    seen_RI, unseen_RI = (torch.randn(TOKENS, COLUMNS, generator=generator) @ mixing_II * energy_I for _ in range(2))
    sizes_I = (0.3 * torch.randn(COLUMNS, generator=generator)).exp()
    weight_OI = torch.randn(ROWS, COLUMNS, generator=generator) * sizes_I
    statistics = InputStatistics(COLUMNS, 0)
    statistics.add(seen_RI)
    moments = statistics.moments()
    energy = float((unseen_RI @ weight_OI.T).square().sum())
    print(f"| scheme | bits | {' | '.join(STEPS)} |")
    print("|---" * (len(STEPS) + 2) + "|")
    for name, scheme in SCHEMES.items():
        changes = (rounded_weight(weight_OI, scheme, moments, steps).difference(weight_OI) for steps in STEPS.values())
        errors = [1e4 * float((unseen_RI @ change_OI.T).square().sum()) / energy for change_OI in changes]
        print(
            f"| {name} | {scheme.bits_per_weight:.3f} | {' | '.join(f'{error:.1f}' for error in errors)} |", flush=True
        )


if __name__ == "__main__":
    main()
