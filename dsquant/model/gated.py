"""The gated MLP that every family has: down(act(gate(x)) * up(x)).

Shape legend: R tokens, H hidden size, W width of the MLP.
"""

from dataclasses import dataclass, field

import torch

from dsquant.kernels.activation_rounding import Rounding, unrounded
from dsquant.kernels.products import apply_linear
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import Mlp
from dsquant.source.weights import Weights


@dataclass(frozen=True)
class GatedWeights:
    """The three weights of a gated MLP, float32."""

    gate_WH: torch.Tensor
    up_WH: torch.Tensor
    down_HW: torch.Tensor
    quantizers: tuple[Rounding, ...] = field(default=(unrounded, unrounded, unrounded), kw_only=True)
    """The engine's rounding of the activations that gate, up and down read."""

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate_WH, self.up_WH, self.down_HW

    @classmethod
    def read(cls, weights: Weights, mlp: Mlp) -> "GatedWeights":
        gate, up, down = (f"{linear}.weight" for linear in mlp.linears)
        quantizers = tuple(weights.activation_quantizer(name) for name in (gate, up, down))
        return cls(weights[gate], weights[up], weights[down], quantizers=quantizers)

    def hidden(self, skeleton: Skeleton, inputs_RH: torch.Tensor) -> torch.Tensor:
        """Returns the down projection's input before it is rounded: act(gate(x)) * up(x), [R, W]."""
        of_gate, of_up, _ = self.quantizers
        for_gate_RH = of_gate(inputs_RH)
        for_up_RH = for_gate_RH if of_up is of_gate else of_up(inputs_RH)
        gated_RW = skeleton.activation(apply_linear(for_gate_RH, self.gate_WH))
        return gated_RW.mul_(apply_linear(for_up_RH, self.up_WH))

    def output(self, skeleton: Skeleton, inputs_RH: torch.Tensor) -> torch.Tensor:
        """Returns the MLP's output, [R, H]."""
        return self.output_of(self.hidden(skeleton, inputs_RH))

    def output_of(self, hidden_RW: torch.Tensor) -> torch.Tensor:
        """Returns the output for what `hidden` returns, [R, H]."""
        return apply_linear(self.quantizers[2](hidden_RW), self.down_HW)
