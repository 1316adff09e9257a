"""Seconds that AutoAWQ 0.2.9's own search functions take on experts of R1's shape, on one GPU.

Its `_search_best_scale` and `_compute_best_clip` are called as its quantizer calls them for this architecture: one
scale search over gate and up of all experts through the mixture's output, one for each down projection, and a clip
search for each linear. Only a few experts are given; the caller scales the seconds up and says so.
"""

import time
import warnings
from typing import Any

import torch
from torch import nn

HIDDEN, WIDTH = 7168, 2048


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """What down_proj reads."""
        return nn.functional.silu(self.gate_proj(inputs)) * self.up_proj(inputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The MLP's output."""
        return self.down_proj(self.hidden(inputs))


class Mixture(nn.Module):
    """Experts that each get an equal share of the rows, as tokens that a router has sent them."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Every expert's output on its share."""
        shares = inputs.chunk(len(self.experts))
        return torch.cat([expert(share) for expert, share in zip(self.experts, shares, strict=True)])


def quantizer() -> Any:
    """AutoAWQ's quantizer with its defaults, without a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from awq.quantize.quantizer import AwqQuantizer
    made = object.__new__(AwqQuantizer)
    made.w_bit, made.group_size, made.zero_point, made.duo_scaling = 4, 128, True, True
    made.max_chunk_memory, made.n_parallel_calib_samples = 1024**3, None
    return made


@torch.no_grad()
def search_seconds(num_experts: int, rows_per_expert: int) -> dict[str, float]:
    """Runs the searches.

    Returns:
        Stage -> seconds for all the experts given.
    """
    awq = quantizer()
    torch.manual_seed(0)
    with torch.device("cuda"):
        mixture = Mixture(num_experts).half()
        inputs = torch.randn(num_experts * rows_per_expert, HIDDEN, dtype=torch.float16)
    linears = [linear for expert in mixture.experts for linear in (expert.gate_proj, expert.up_proj)]
    seconds = {}

    def timed(stage: str, work: Any) -> None:
        torch.cuda.synchronize()
        started = time.monotonic()
        work()
        torch.cuda.synchronize()
        seconds[stage] = time.monotonic() - started

    timed("scales of gate and up", lambda: awq._search_best_scale(mixture, mixture, linears, inputs, mixture))
    shares = inputs.chunk(num_experts)
    hidden = [expert.hidden(share) for expert, share in zip(mixture.experts, shares, strict=True)]

    def search_down() -> None:
        for expert, inside in zip(mixture.experts, hidden, strict=True):
            awq._search_best_scale(expert, expert.up_proj, [expert.down_proj], inside)

    def search_clip() -> None:
        for expert, share, inside in zip(mixture.experts, shares, hidden, strict=True):
            for linear, features in ((expert.gate_proj, share), (expert.up_proj, share), (expert.down_proj, inside)):
                awq._compute_best_clip(linear.weight, features)

    timed("scales of down", search_down)
    timed("clip", search_clip)
    return seconds
