"""`dsquant` on a CPU as it runs on GPUs: hidden states are kept in bfloat16, and in memory in the layers named."""

from dataclasses import replace
from typing import Any

import torch

from dsquant.model import activations
from dsquant.pipeline import inputs as preparation
from dsquant.pipeline import run_state
from dsquant.pipeline.planning import Plan, plan_run

KEPT = {"none": range(0), "odd": range(1, 100, 2), "every": range(100)}


def patch(kept: range) -> None:
    """Changes what depends on the device; everything else is the real job."""

    def planned(*arguments: Any, **named: Any) -> Plan:
        plan = plan_run(*arguments, **named)
        return replace(plan, needs=replace(plan.needs, gpu_resident=frozenset(kept)))

    preparation.plan_run = planned
    for module in (activations, run_state):
        module.stored_dtype = lambda device: torch.bfloat16
