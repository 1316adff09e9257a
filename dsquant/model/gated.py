"""The gated MLP that every family has: down(act(gate(x)) * up(x)).

Shape legend: R tokens, H hidden size, W width of the MLP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import Mlp
from dsquant.source.weights import Weights


@dataclass(frozen=True)
class GatedWeights:
    """The three weights of a gated MLP, float32."""

    gate_WH: torch.Tensor
    up_WH: torch.Tensor
    down_HW: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down."""
        return self.gate_WH, self.up_WH, self.down_HW

    @classmethod
    def read(cls, weights: Weights, mlp: Mlp) -> "GatedWeights":
        """Reads an MLP's weights."""
        return cls(*(weights[f"{linear}.weight"] for linear in mlp.linears))

    def hidden(self, skeleton: Skeleton, inputs_RH: torch.Tensor) -> torch.Tensor:
        """The down projection's input: act(gate(x)) * up(x), [R, W]."""
        gated_RW = skeleton.activation(F.linear(inputs_RH, self.gate_WH))
        return gated_RW.mul_(F.linear(inputs_RH, self.up_WH))

    def output(self, skeleton: Skeleton, inputs_RH: torch.Tensor) -> torch.Tensor:
        """The MLP's output, [R, H]."""
        return F.linear(self.hidden(skeleton, inputs_RH), self.down_HW)
