"""NVFP4's rounding of what linears read (W4A4) as engines do it, in float32, sharing no code with dsquant.

The checkpoint has one number for each linear's input; the scale of each block of 16, in FP8, is the token's own. As in
vLLM 0.33 all experts of a layer have the least sensitive one's number, and so have linears that it fuses.
"""

import math
import re

import torch
from transformers import PreTrainedModel

BLOCK = 16
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0


def input_scales(stored: dict[str, torch.Tensor], quantization: dict) -> dict[str, float]:
    """Module -> what the scales of its input's blocks are multiplied by; empty where inputs are not rounded.

    Args:
        stored: tensors as stored.
        quantization: the checkpoint's quantization_config.

    Returns:
        Of an expert the layer's, under `*.experts.up_proj` and `*.experts.down_proj`.
    """
    groups = quantization.get("config_groups", {}).values()
    if not any(group.get("input_activations") and group["weights"]["type"] == "float" for group in groups):
        return {}
    found: dict[str, float] = {}
    for name, number in stored.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("input_scale", "input_global_scale"):
            continue
        module = re.sub(r"\.experts\.\d+\.", ".experts.", module)
        module = module.replace(".experts.gate_proj", ".experts.up_proj")
        scale = float(number) if kind == "input_scale" else 1 / float(number)
        found[module] = max(scale, found.get(module, 0.0))
    return found


def rounded(inputs_RI: torch.Tensor, scale: float) -> torch.Tensor:
    """Inputs in NVFP4, in float32.

    Args:
        inputs_RI: float32 [..., I], I a multiple of 16.
        scale: of the tensor.

    Returns:
        The same shape.
    """
    blocks = inputs_RI.unflatten(-1, (-1, BLOCK))
    wanted = blocks.abs().amax(-1, keepdim=True) / LARGEST_E2M1 / scale
    scales = wanted.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float() * scale
    values = torch.where(scales > 0, blocks / scales, 0.0).clamp(-LARGEST_E2M1, LARGEST_E2M1)
    steps = 2.0 ** values.abs().clamp(min=1.0).log2().floor() / 2  # ties go to the even mantissa
    return ((values / steps).round() * steps * scales).flatten(-2)


def round_inputs(model: PreTrainedModel, scales: dict[str, float]) -> None:
    """Has a model's linears read rounded inputs.

    Args:
        model: a DeepSeek-V3 with its experts fused.
        scales: of `input_scales`.
    """
    for name, module in model.named_modules():
        if name in scales:
            scale = scales[name]
            module.register_forward_pre_hook(lambda _, inputs, scale=scale: (rounded(inputs[0], scale),))
        elif f"{name}.up_proj" in scales and name.endswith(".experts"):
            module.forward = _experts(module, scales[f"{name}.up_proj"], scales[f"{name}.down_proj"])
    assert math.isfinite(sum(scales.values()))


def _experts(module: torch.nn.Module, of_input: float, of_hidden: float):
    """The forward of a layer's experts."""

    def forward(hidden_RH: torch.Tensor, index_RK: torch.Tensor, share_RK: torch.Tensor) -> torch.Tensor:
        output_RH, inputs_RH = torch.zeros_like(hidden_RH), rounded(hidden_RH, of_input)
        for expert in index_RK.unique().tolist():
            rows, places = torch.where(index_RK == expert)
            gate, up = (inputs_RH[rows] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = rounded(module.act_fn(gate) * up, of_hidden)
            output_RH.index_add_(0, rows, inner @ module.down_proj[expert].T * share_RK[rows, places, None])
        return output_RH

    return forward
