"""Opens and validates everything that a run reads, before anything is written."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsquant.calibration import calibration_tokens, load_tokenizer
from dsquant.errors import InputError
from dsquant.model.skeleton import Skeleton
from dsquant.planning import Plan, plan_run
from dsquant.recipe import Recipe, format_size
from dsquant.source.checkpoint import Checkpoint, open_checkpoint
from dsquant.source.locate import locate

LARGEST_DEFAULT_BUDGET = 16 * 2**30


@dataclass(frozen=True)
class Source:
    """The model to quantize, opened and checked from headers."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Any
    tokens_NT: torch.Tensor
    """Calibration tokens, int64 [N, T]."""
    calibration: dict[str, Any]
    """Where they come from and their hash."""
    plan: Plan


def open_source(recipe: Recipe) -> Source:
    """Opens and validates everything a run reads, from headers, tokenizer and calibration texts alone.

    Args:
        recipe: the run's recipe.

    Returns:
        The source.

    Raises:
        InputError: where anything is missing, damaged or contradicts something else.
        UsageError: where a format cannot store what the recipe asks for.
    """
    checkpoint = open_checkpoint(locate(recipe.model))
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method", "fp8")
    if method != "fp8":
        raise InputError(
            f"{checkpoint.folder}: the model is already quantized ({method}); start from the FP8 or BF16 release"
        )
    skeleton = Skeleton(checkpoint)
    plan = plan_run(recipe, checkpoint, skeleton)
    tokenizer = load_tokenizer(checkpoint.folder)
    _check_vocabulary(checkpoint, tokenizer)
    tokens = calibration_tokens(recipe.calibration, tokenizer, recipe.samples, recipe.seq_len, recipe.seed)
    calibration = {key: value for key, value in asdict(tokens).items() if key != "tokens"}
    calibration |= {"samples": len(tokens.tokens), "seq_len": tokens.tokens.shape[1]}
    return Source(checkpoint, skeleton, tokenizer, tokens.tokens, calibration, plan)


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: Any) -> None:
    rows = checkpoint.weights.shape("model.embed_tokens.weight")[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{checkpoint.folder / 'tokenizer.json'}: the tokenizer has {len(tokenizer)} tokens, tensor "
            f"'model.embed_tokens.weight' only {rows} rows; tokenizer and weights are of different models"
        )


def memory_budget(recipe: Recipe) -> int:
    """The budget in bytes: the recipe's, or 80 % of what is available now, at most 16 GiB."""
    import psutil

    return recipe.memory_budget or min(LARGEST_DEFAULT_BUDGET, int(psutil.virtual_memory().available * 0.8))


def check_disk(recipe: Recipe, plan: Plan) -> None:
    """Refuses to begin where the disk cannot hold the output.

    Args:
        recipe: the run's recipe.
        plan: its plan.

    Raises:
        InputError: with the bytes needed and free.
    """
    existing = next(path for path in (recipe.output.absolute(), *recipe.output.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in recipe.output.rglob("*") if path.is_file())
    statistics = os.statvfs(existing)
    free = statistics.f_bavail * statistics.f_frsize
    needed = plan.work_bytes + sum(target.shards.num_bytes for target in plan.targets) - there
    if needed > free:
        raise InputError(
            f"{existing}: the output needs {format_size(needed)} more, {format_size(free)} are free; make room or "
            "name a folder on another disk"
        )
