"""What torchrun or accelerate's launcher has told this process: which of how many it is. Imports no torch."""

import os
from dataclasses import dataclass

from dsquant.errors import UsageError


@dataclass(frozen=True)
class Launched:
    """This process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""


def several_ranks() -> bool:
    """Whether a launcher has started this process as one of several; false where its variables make no sense."""
    try:
        return launched().size > 1
    except UsageError:
        return False


def launched() -> Launched:
    """Reads the launcher's environment variables; without a launcher this is the only process. Raises UsageError naming
    a variable that is missing or makes no sense."""
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        return Launched()
    if not os.environ.get("MASTER_ADDR"):
        raise UsageError(f"MASTER_ADDR is not set, though WORLD_SIZE is {size}; {_START}")
    _number("MASTER_PORT", None, least=1, most=65535)
    return Launched(_number("RANK", None, most=size - 1), size, _number("LOCAL_RANK", 0, most=size - 1))


_START = "start several processes by torchrun or accelerate launch"


def _number(name: str, default: int | None, least: int = 0, most: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UsageError(f"{name} is not set, though WORLD_SIZE is {os.environ.get('WORLD_SIZE')}; {_START}")
    if not text.strip().isdecimal() or int(text) < least or (most is not None and int(text) > most):
        wanted = f"a number from {least}" + ("" if most is None else f" to {most}")
        raise UsageError(f"the environment variable {name} is {text!r:.40}, expected {wanted}; {_START}")
    return int(text)
