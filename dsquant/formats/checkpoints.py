"""Opens checkpoint folders of the architectures that dsquant knows, under the names of a release."""

from pathlib import Path
from typing import Any

import torch

from dsquant.model.families import family_of
from dsquant.model.layouts import as_released, text_config
from dsquant.source.checkpoint import Checkpoint, read_config, read_config_file, stored_checkpoint
from dsquant.source.shards import ShardIndex, read_index
from dsquant.source.weights import CPU


def open_checkpoint(folder: Path, device: torch.device = CPU) -> Checkpoint:
    """Opens a checkpoint folder; reads config.json and the shards' headers, no weights.

    Args:
        folder: a folder with config.json and safetensors shards.
        device: where its weights go when they are read.

    Returns:
        The checkpoint, whose weights are read on access.

    Raises:
        InputError: where the architecture is not supported, or config.json or the shards are missing, damaged, or
            contradict each other.
    """
    config = read_config(folder)
    _check_architecture(folder, config)  # before its tensors, which may be of a kind that is known for no other reason
    return checkpoint_of(folder, config, read_index(folder), device)


def checkpoint_of(folder: Path, config: dict[str, Any], index: ShardIndex, device: torch.device = CPU) -> Checkpoint:
    """Puts a config and an index together.

    Args:
        folder: the checkpoint's folder.
        config: config.json's content.
        index: the tensors, as they are stored.
        device: where its weights go when they are read.

    Returns:
        The checkpoint, whose weights are read on access.

    Raises:
        InputError: where the architecture is not supported, or config and tensors contradict each other.
    """
    _check_architecture(folder, config)
    return stored_checkpoint(folder, *as_released(folder, config, index), device)


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    family_of(folder, text_config(folder, config))


def read_text_config(path: Path) -> dict[str, Any]:
    """Reads the text model's config from a config.json; as `read_config_file`."""
    return text_config(path.parent, read_config_file(path))
