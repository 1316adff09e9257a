"""Checks a checkpoint's tensors against the network that its config describes."""

from collections.abc import Sequence
from pathlib import Path

from dsquant.errors import InputError
from dsquant.model.skeleton import Skeleton, check_shape
from dsquant.model.structure import layer_number
from dsquant.source.checkpoint import Checkpoint

# Computed from the config by every engine; old Llama checkpoints store them all the same.
COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
HEAD = "lm_head.weight"


def check_complete(checkpoint: Checkpoint, skeleton: Skeleton, mtp: str = "keep") -> None:
    """Checks every tensor of a checkpoint against the network that its config describes.

    With `mtp="drop"` anything may be in the multi-token-prediction layers. Raises InputError at the first tensor that
    is missing, superfluous or of another shape.
    """
    unused = range(skeleton.num_layers, len(skeleton.layers)) if mtp == "drop" else range(0)
    expected = {name: shape for name, shape in skeleton.expected_shapes().items() if layer_number(name) not in unused}
    unknown = [
        name
        for name in checkpoint.weights
        if name not in expected
        and layer_number(name) not in unused
        and not name.endswith(COMPUTED_SUFFIX)
        and name != HEAD
    ]
    for name, shape in expected.items():
        if name not in checkpoint.weights:
            if name in skeleton.optional:
                continue
            raise InputError(_missing(checkpoint, skeleton, name, unknown))
        check_shape(checkpoint, name, shape)
    if unknown:
        path, label = _place(checkpoint, unknown[0])
        raise InputError(f"{path}: tensor {label} is not part of {_described(checkpoint, skeleton)}")


def _missing(checkpoint: Checkpoint, skeleton: Skeleton, name: str, unknown: Sequence[str]) -> str:
    """Returns the message for a missing tensor; where others are superfluous, all may be there in another layout."""
    if unknown:
        path, label = _place(checkpoint, unknown[0])
        return (
            f"{path}: tensor {label} is there instead of {name!r}, and {len(unknown) - 1} more that are not part of "
            f"{_described(checkpoint, skeleton)}: they were saved in a layout that dsquant does not read, or "
            "config.json is of another model"
        )
    message = (
        f"{checkpoint.folder}: tensor {name!r} is missing: config.json calls for it, no shard has it; download the "
        "checkpoint again, or take config.json from the same release"
    )
    of_mtp = (layer_number(name) or 0) >= skeleton.num_layers
    return f"{message}; --mtp drop leaves this layer out" if of_mtp else message


def _place(checkpoint: Checkpoint, name: str) -> tuple[Path, str]:
    """Returns the file of a tensor, and its name in messages."""
    info = checkpoint.index.get(name)
    return (info.path, info.label) if info else (checkpoint.folder, repr(name))


def _described(checkpoint: Checkpoint, skeleton: Skeleton) -> str:
    return (
        f"{checkpoint.architecture} as config.json describes it ({skeleton.num_layers} layers, "
        f"{skeleton.num_mtp_layers} for multi-token prediction)"
    )
