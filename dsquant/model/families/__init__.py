"""The architectures that dsquant knows, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.model.families.deepseek_v3 import DEEPSEEK_V3
from dsquant.model.families.llama import LLAMA, QWEN2, QWEN3
from dsquant.model.structure import Family

FAMILIES = {family.architecture: family for family in (DEEPSEEK_V3, LLAMA, QWEN2, QWEN3)}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of a config's `architectures`; empty where it names none."""
    found = config.get("architectures")
    return found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""


def unsupported(folder: Path, architecture: str) -> InputError:
    """The error for an architecture that dsquant does not know."""
    return InputError(
        f"{folder / 'config.json'}: architecture {architecture} is not supported; dsquant knows {', '.join(FAMILIES)}"
    )


def family_of(folder: Path, config: Mapping[str, Any]) -> Family:
    """Finds the family of a checkpoint.

    Args:
        folder: the checkpoint's folder, for the message.
        config: its config.json.

    Returns:
        The family.

    Raises:
        InputError: where the architecture, or something in the config, is not supported.
    """
    architecture = architecture_of(config)
    if architecture not in FAMILIES:
        raise unsupported(folder, repr(architecture))
    family = FAMILIES[architecture]
    reason = family.refuse(config)
    if reason:
        raise InputError(f"{folder / 'config.json'}: {architecture}: {reason}")
    return family
