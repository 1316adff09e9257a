"""Opens checkpoint folders of the architectures that dsquant knows, under the names of a release."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsquant.errors import InputError
from dsquant.formats.safetensors import SafetensorsFormat
from dsquant.formats.table import SAFETENSORS
from dsquant.model.families import family_of
from dsquant.model.layouts import as_released, text_config
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint, StoredWeights, block_size, read_config, read_config_file
from dsquant.source.shards import ShardIndex, read_index
from dsquant.source.weights import CPU, Weights


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
    config, index, notes = as_released(folder, config, index)
    return Checkpoint(folder, config, index, stored_weights(index, config, device), notes)


def stored_weights(index: ShardIndex, config: Mapping[str, Any], device: torch.device = CPU) -> Weights:
    """Opens weights as config.json says that they are stored.

    Args:
        index: the tensors.
        config: config.json's content.
        device: where the weights go when they are read, and where quantized ones are decoded.

    Returns:
        Weights under the original's names.

    Raises:
        InputError: where the config is of no format that is read, or the tensors contradict it.
    """
    quantization = config.get("quantization_config") or {}
    path = index.folder / CONFIG_FILE
    if not isinstance(quantization, dict):
        raise InputError(f"{path}: quantization_config must be an object, found {quantization!r:.80}")
    found = format_of_config(config)
    if found is not None:
        return found.decoded(index, quantization, device)
    if quantization.get("quant_method") in (None, "fp8"):
        return StoredWeights(index, block_size(index.folder, quantization), device)
    raise InputError(
        f"{path}: quant_method {quantization['quant_method']!r:.80} is not supported; dsquant reads fp8 (128x128 "
        f"blocks), {', '.join(SAFETENSORS)}"
    )


def format_of_config(config: Mapping[str, Any]) -> SafetensorsFormat | None:
    """The format that a config.json describes; None where its weights are FP8 or floats, or of no format known."""
    quantization = config.get("quantization_config") or {}
    return next((known for known in SAFETENSORS.values() if known.wrote(quantization)), None)


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    family_of(folder, text_config(folder, config))


def read_text_config(path: Path) -> dict[str, Any]:
    """Reads the text model's config from a config.json; as `read_config_file`."""
    return text_config(path.parent, read_config_file(path))
