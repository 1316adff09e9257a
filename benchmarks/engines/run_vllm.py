"""Scores tokens with vLLM on a CPU (`scoring.py` tells how it is called). Runs in vLLM's environment.

vLLM reads config and shards, finds each linear's scheme, fuses and lays out; what multiplies is another matter. Its
kernel for 4-bit linears wants AVX-512, that for 4-bit experts AMX, and others are for GPUs alone. Where one is missing,
the weights that vLLM has laid out are dequantized here and multiplied by PyTorch: experts by vLLM's own emulation,
whose last step is a Triton kernel. Rotary embedding is vLLM's own in PyTorch, too: its operator for a CPU (0.32.0)
rotates queries of several heads wrongly where these lie in a dimension of their own, as latent attention has them.
"""

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import PlatformEnum

from benchmarks.engines.scoring import score_all
from benchmarks.engines.vllm_scores import score


class LinearInPyTorch(MPLinearKernel):
    """Takes any integer weights in groups, dequantized when they are loaded."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Any processor."""
        return -1

    @classmethod
    def can_implement(cls, _) -> tuple[bool, str | None]:
        """Yes."""
        return True, None

    def process_weights_after_loading(self, layer) -> None:
        """Makes BF16 [O, I] of the words, in whichever direction vLLM holds them."""
        words, scales, zeros = self._get_weight_params(layer)
        columns, rows = self.config.partition_weight_shape
        bits, middle = self.config.weight_type.size_bits, self.config.weight_type.bias
        codes_OI = unpacked(words.data if words.input_dim else words.data.t(), columns, bits)
        scales_OG = scales.data if scales.output_dim == 0 else scales.data.t()
        zeros_OG = torch.full(scales_OG.shape, middle)
        if self.config.zero_points:
            zeros_OG = unpacked(zeros.data.t() if zeros.output_dim == 0 else zeros.data, rows, bits).t()
        codes_OGS = codes_OI.unflatten(1, (scales_OG.shape[1], -1)) - zeros_OG.unsqueeze(2)
        layer.dequantized = (codes_OGS * scales_OG.float().unsqueeze(2)).flatten(1).to(torch.bfloat16)

    def apply_weights(self, layer, x, bias=None) -> torch.Tensor:
        """Multiplies in BF16."""
        return torch.nn.functional.linear(x, layer.dequantized, bias)


def unpacked(words_RW: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Codes of a dense stream of int32 words along each row, the first in the lowest bits: int64 [R, count]."""
    bytes_ = words_RW.contiguous().view(torch.uint8)
    stream = (bytes_.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return (stream.flatten(1)[:, : count * bits].unflatten(1, (count, bits)).long() << torch.arange(bits)).sum(2)


def experts_in_pytorch(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_, **__) -> None:
    """Adds up what each token's experts make of it, with weights w1 [E, 2M, H] and w2 [E, H, M]."""
    total = torch.zeros(output.shape, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(w1, w2, strict=True)):
        rows, places = torch.where(topk_ids == expert)
        gate, up = torch.nn.functional.linear(hidden_states[rows], gate_up).chunk(2, -1)
        made = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)
        total.index_add_(0, rows, made.float() * topk_weights[rows, places, None].float())
    output.copy_(total)


def multiply_in_pytorch() -> None:
    """Puts PyTorch's products where this processor has no kernel of vLLM's."""
    of_cpu = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    of_cpu.insert(len(of_cpu) if hasattr(torch.ops._C, "cpu_gemm_wna16") else 0, LinearInPyTorch)
    if not torch.cpu._is_amx_tile_supported():
        Int4EmulationTritonExperts._supports_current_device = staticmethod(lambda: True)
        Int4EmulationTritonExperts.apply = experts_in_pytorch
        int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.EMULATION]


if __name__ == "__main__":
    multiply_in_pytorch()
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    score_all(score)
