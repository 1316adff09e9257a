"""Candidates broken on purpose: copies of an AWQ checkpoint with one mistake that quantizers have made."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsquant.source.weights import Weights

Change = Callable[[dict[str, torch.Tensor]], None]


def changed_copy(checkpoint: Path, copy: Path, change: Change) -> Path:
    """Copies a checkpoint and changes its tensors, shard by shard."""
    shutil.copytree(checkpoint, copy)
    for shard in sorted(copy.glob("*.safetensors")):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
    return copy


def router_not_compensated(original: Weights, layer: int) -> Change:
    """The norm was divided by the scales, the router was left as it was (AutoAWQ, llm-compressor before PR 2451)."""
    name = f"model.layers.{layer}.mlp.gate.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            assert not torch.equal(tensors[name].float(), original[name]), "nothing was folded into this layer"
            tensors[name] = original[name].to(tensors[name].dtype)

    return change


def expert_zeroed(layer: int, expert: int) -> Change:
    """One expert's scales are all zero."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(prefix) and name.endswith(".scales"):
                tensor.zero_()

    return change


def nibbles_swapped(layer: int, module: str) -> Change:
    """The two codes in each byte of one linear have changed places."""
    name = f"model.layers.{layer}.{module}.qweight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            bytes_ = tensors[name].view(torch.uint8)
            tensors[name] = ((bytes_ << 4) | (bytes_ >> 4)).view(torch.int32).contiguous()

    return change


def scale_not_a_number(layer: int, module: str) -> Change:
    """One scale of one linear is NaN."""
    name = f"model.layers.{layer}.{module}.scales"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name][0, 0] = float("nan")

    return change
