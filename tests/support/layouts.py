"""Checkpoints of one small R1, saved in many ways."""

import re
from pathlib import Path
from typing import Any

import torch
from checkpoints import PICO_R1, add_tokenizer, r1_shapes, random_weights, save_checkpoint, stored
from safetensors.torch import load_file

import dsquant
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.complete import check_complete
from dsquant.model.skeleton import Skeleton

CONFIG: dict[str, Any] = PICO_R1 | {
    "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 128, "moe_intermediate_size": 128,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": 64, "kv_lora_rank": 64,
}  # fmt: skip


FAST: dict[str, Any] = {
    "samples": 2, "seq_len": 32, "group_size": 64, "preset": "compact", "steps": "none", "evaluate": False,
    "progress": False,
}  # fmt: skip


Tensors = dict[str, torch.Tensor]


def small_tensors(fp8: bool = False, **changes: Any) -> Tensors:
    return stored(random_weights(r1_shapes(CONFIG | changes)), fp8)


def fused(tensors: Tensors) -> Tensors:
    """Every layer's experts as transformers 5 keeps them: [E, 2I, H] and [E, H, I], and scales likewise."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix, scales in {
        (match[1], match[2] or "") for name in tensors if (match := re.match(r"(.*\.experts\.)0\..*weight(_.*)?", name))
    }:

        def parts(kind: str, prefix: str = prefix, scales: str = scales) -> torch.Tensor:
            names = (f"{prefix}{expert}.{kind}_proj.weight{scales}" for expert in range(CONFIG["n_routed_experts"]))
            return torch.stack([tensors[name] for name in names])

        kept[f"{prefix}gate_up_proj{scales}"] = torch.cat([parts("gate"), parts("up")], dim=1)
        kept[f"{prefix}down_proj{scales}"] = parts("down")
    return kept


def renamed(tensors: Tensors, *changes: tuple[str, str]) -> Tensors:
    for pattern, replacement in changes:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def save(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    return add_tokenizer(save_checkpoint(folder, CONFIG | changes, tensors, num_shards=2))


def save_wrapped(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    """A checkpoint as one that also sees: its text model's config inside, and a vision tower beside."""
    inner = {key: value for key, value in CONFIG.items() if key != "architectures"} | changes
    config = {"architectures": ["SeeingForConditionalGeneration"], "model_type": "seeing", "text_config": inner}
    seen = {"vision_tower.blocks.0.norm.weight": torch.ones(4), "model.projector.weight": torch.ones(4, 4)}
    return add_tokenizer(save_checkpoint(folder, config, tensors | seen, num_shards=2))


def assert_same_weights(found: Path, wanted: Path) -> None:
    weights, others = open_checkpoint(found).weights, open_checkpoint(wanted).weights
    assert set(weights) == set(others)
    assert all(torch.equal(weights[name], others[name]) for name in others)


def written_tensors(output: Path) -> Tensors:
    return {name: tensor for file in sorted(output.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(found: Path, wanted: Path) -> None:
    tensors, others = written_tensors(found), written_tensors(wanted)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def awq(model: Path, text_file: Path, output: Path, **options: Any) -> Any:
    return dsquant.awq(model, output=output, calibration=(str(text_file),), **FAST | options)


def complete(folder: Path, mtp: str = "keep") -> tuple[int, tuple[str, ...]]:
    """How many MTP layers a checkpoint is read with, and what is told of it."""
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    check_complete(checkpoint, skeleton, mtp)
    return skeleton.num_mtp_layers, checkpoint.notes
