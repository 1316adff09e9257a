"""`dsquant` as it runs on GPUs, on a CPU: hidden states are kept in bfloat16, and stay in memory in the layers named.

python tests/as_on_gpus.py none|odd awq MODEL ...
"""

import sys
from dataclasses import replace
from typing import Any

import torch

from dsquant.cli import main
from dsquant.model import activations
from dsquant.pipeline import inputs as preparation
from dsquant.pipeline import units as conversion
from dsquant.pipeline.plan import Plan, plan_run

KEPT = {"none": range(0), "odd": range(1, 100, 2)}


def patch(kept: range) -> None:
    """Changes what depends on the device; everything else is the real job."""

    def planned(*arguments: Any, **named: Any) -> Plan:
        return replace(plan_run(*arguments, **named), gpu_resident=frozenset(kept))

    preparation.plan_run = planned
    for module in (activations, conversion):
        module.stored_dtype = lambda device: torch.bfloat16


if __name__ == "__main__":
    patch(KEPT[sys.argv.pop(1)])
    main()
