"""The architectures that dsquant knows, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.model.families.deepseek_v3 import DEEPSEEK_V3
from dsquant.model.families.llama import LLAMA, QWEN2, QWEN3
from dsquant.model.structure import Family

FAMILIES = {family.architecture: family for family in (DEEPSEEK_V3, LLAMA, QWEN2, QWEN3)}


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
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise InputError(
            f"{folder / 'config.json'}: architecture {architecture!r} is not supported; dsquant knows "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    reason = family.refuse(config)
    if reason:
        raise InputError(f"{folder / 'config.json'}: {architecture}: {reason}")
    return family
