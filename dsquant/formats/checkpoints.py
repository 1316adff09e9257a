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
    """Opens a checkpoint folder from config.json and the shards' headers; weights are read on access, to `device`.

    Raises InputError where the architecture is not supported, or config.json or the shards are missing, damaged, or
    contradict each other.
    """
    config = read_config(folder)
    _check_architecture(folder, config)  # before its tensors, which may be of a kind that is known for no other reason
    return checkpoint_of(folder, config, read_index(folder), device)


def checkpoint_of(folder: Path, config: dict[str, Any], index: ShardIndex, device: torch.device = CPU) -> Checkpoint:
    """Makes a checkpoint of config.json's content and the tensors as they are stored; weights are read on access.

    Raises InputError where the architecture is not supported, or config and tensors contradict each other.
    """
    _check_architecture(folder, config)
    _check_quantization(folder / CONFIG_FILE, config)
    config, index, notes = as_released(folder, config, index)
    return Checkpoint(folder, config, index, stored_weights(index, config, device), notes)


def stored_weights(index: ShardIndex, config: Mapping[str, Any], device: torch.device = CPU) -> Weights:
    """Opens weights, under the original's names, as config.json describes them; quantized ones are decoded on `device`.

    Raises InputError where dsquant does not read the config's format, or the tensors contradict it.
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


def format_of_config(config: Mapping[str, Any]) -> SafetensorsFormat[Any] | None:
    """Returns the format that a config.json describes; None where its weights are FP8 or floats, or of an unknown
    format."""
    quantization = config.get("quantization_config") or {}
    return next((known for known in SAFETENSORS.values() if known.wrote(quantization)), None)


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    family_of(folder, text_config(folder, config))


def _check_quantization(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a config that tells engines of a format one thing, and dsquant another."""
    known, read = format_of_config(config), config.get("quantization_config")
    for key in known.config_keys if known else ():
        if config.get(key) != read:
            raise InputError(f"{path}: engines read {key!r}, which is not what 'quantization_config' says")


def read_text_config(path: Path) -> dict[str, Any]:
    """Reads the text model's config from a config.json."""
    return text_config(path.parent, read_config_file(path))
