"""Opens and validates everything that a run reads, before anything is written."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsquant.calibration.texts import calibration_tokens, check_held_out, load_tokenizer
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.files.foreign import find_file
from dsquant.formats.checkpoints import format_of_config, open_checkpoint, read_text_config
from dsquant.formats.compressed_tensors_weights import CompressedTensorsWeights
from dsquant.formats.table import FORMATS, SAFETENSORS, format_of
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.jobs.resources import LARGEST_DEFAULT_BUDGET, default_memory_budget, resolved_device
from dsquant.model.complete import check_complete
from dsquant.model.families import FAMILIES, is_mixture
from dsquant.model.fp8_layouts import WHOLE
from dsquant.model.repeated import check_repeated
from dsquant.model.skeleton import Skeleton
from dsquant.options import format_size
from dsquant.pipeline.planning import Plan, plan_run
from dsquant.presets import Rest, default_steps
from dsquant.recipes import Recipe
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint
from dsquant.source.locate import locate
from dsquant.source.vocabulary import set_embedding_rows
from dsquant.source.weights import CPU, Weights


@dataclass(frozen=True)
class Source:
    """The model to quantize, opened and checked from headers."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    tokenizer: Any
    tokens_NT: torch.Tensor | None
    """Calibration tokens, int64 [N, T]; None without calibration."""
    calibration: dict[str, Any] | None
    """Where they come from and their hash."""
    plan: Plan
    notes: tuple[str, ...] = ()
    """Notes for the user on the model's files."""


def resolved(recipe: Recipe) -> Recipe:
    """Fills in the recipe's defaults that depend on the model, so that a default and its name are the same recipe:
    formats, groups, what is not quantized, device, preset, steps, mtp, and, where all formats agree, symmetric.

    Raises InputError where the model is not there, UsageError where its device is not there, or FP8 is asked for where
    there is none.
    """
    folder = locate(recipe.model)
    config = read_text_config(folder / CONFIG_FILE)
    recipe, mixture = with_format(recipe, config), is_mixture(config)
    if "group_size" not in recipe.model_fields_set and any(name in SAFETENSORS for name in recipe.to):
        recipe = with_group_size(recipe, open_checkpoint(folder).weights)
    packed = recipe.to == ("compressed-tensors",) and is_packed(config)  # its experts stay as they are
    preset = recipe.preset or ("quality" if mixture and not packed else "compact")
    if preset == "quality" and not mixture:
        preset = "compact"
    symmetric = {format_of(name).default_symmetric(mixture) for name in recipe.to} - {None}
    agreed = symmetric.pop() if len(symmetric) == 1 else None
    chosen = agreed if recipe.symmetric is None else recipe.symmetric
    mtp = recipe.mtp if any(format_of(name).keeps_mtp for name in recipe.to) else "drop"
    if recipe.activations and not any(recipe.activations in format_of(name).activations for name in recipe.to):
        taking = [name for name, known in FORMATS.items() if recipe.activations in known.activations]
        raise UsageError(
            f"--activations {recipe.activations}: {' and '.join(recipe.to)} has no inputs of that kind; take --to "
            f"{' or '.join(taking)}"
        )
    device, rest = resolved_device(recipe.device), rest_of(recipe.rest, recipe.to, config)
    unset = "steps" not in recipe.model_fields_set
    steps = default_steps(preset, config.get("hidden_size")) if unset else recipe.steps
    told = {"preset": preset, "steps": steps, "symmetric": chosen, "mtp": mtp, "device": device, "rest": rest}
    return recipe.model_copy(update=told)


def with_format(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """Returns a recipe with the format that its model is quantized to where it names none, from the config.json."""
    if "to" in recipe.model_fields_set:
        return recipe
    kept = has_fp8_blocks(config) or is_packed(config)
    return recipe.model_copy(update={"to": ("compressed-tensors",) if kept else ("awq",)})


def is_packed(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes a release in few bits, which compressed-tensors takes over."""
    return format_of_config(config) is format_of("compressed-tensors")


def with_group_size(recipe: Recipe, weights: Weights) -> Recipe:
    """Returns a recipe with groups that fit, where it names none and a linear of these weights has columns that are not
    whole groups of the default."""
    size = recipe.group_size
    if "group_size" in recipe.model_fields_set or size == "auto":
        return recipe
    shapes = (weights.shape(name) for name in weights if ".layers." in name and name.endswith(".weight"))
    odd = any(len(shape) == 2 and shape[1] % size for shape in shapes)
    return recipe.model_copy(update={"group_size": "auto"}) if odd else recipe


def has_fp8_blocks(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes a release in FP8 blocks."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return False
    block = quantization.get("weight_block_size")
    return not isinstance(block, list) or WHOLE not in block


def rest_of(asked: Rest | None, formats: Collection[str], config: Mapping[str, Any]) -> Rest | None:
    """Returns how linears that are not quantized are stored, None where there is no choice: as asked for, or in a
    release's FP8 blocks where one of the formats holds them. Raises UsageError where blocks cannot be kept."""
    holding = [name for name in formats if format_of(name).holds_fp8]
    if asked != "fp8":
        return asked or ("fp8" if holding and has_fp8_blocks(config) else None)
    if not holding:
        raise UsageError(f"--rest fp8: {' and '.join(formats)} holds no FP8 blocks; add --to compressed-tensors")
    if not has_fp8_blocks(config):
        raise UsageError("--rest fp8: the model has no FP8 blocks; leave the option out")
    return "fp8"


def open_source(recipe: Recipe, gpu_budget_bytes: int | None = None, num_ranks: int = 1) -> Source:
    """Opens and validates everything a run of `num_ranks` processes reads, from headers, tokenizer and calibration
    texts alone.

    Without `gpu_budget_bytes`, the budget is `gpu_memory_budget`'s. Raises InputError where anything is missing,
    damaged or contradicts something else, UsageError where a format cannot store what the recipe asks for.
    """
    _check_texts(recipe)
    checkpoint, skeleton = open_model(recipe.model, torch.device(recipe.device), recipe.mtp)
    if recipe.calibration:
        skeleton.check_length(recipe.seq_len)
    gpu_budget = gpu_memory_budget(recipe) if gpu_budget_bytes is None else gpu_budget_bytes
    plan = plan_run(recipe, checkpoint, skeleton, gpu_budget, num_ranks)
    notes = tuple(check_repeated(checkpoint, skeleton))
    tokenizer = open_tokenizer(checkpoint)
    tokens_NT, calibration = open_calibration(recipe, tokenizer)
    if recipe.evaluate:
        check_held_out(tokenizer)
    return Source(checkpoint, skeleton, tokenizer, tokens_NT, calibration, plan, notes)


def open_model(model: str, device: torch.device = CPU, mtp: str = "keep") -> tuple[Checkpoint, Skeleton]:
    """Opens an unquantized checkpoint (a folder, a hub id, or `tiny-r1`) and builds its network.

    `device` gets the weights that are read; with `mtp="drop"` anything may be in the multi-token-prediction layers.
    Raises InputError where the checkpoint is missing, damaged, incomplete, or quantized already, or packed
    weights contradict the shapes that they state.
    """
    checkpoint = open_checkpoint(locate(model), device)
    check_unquantized(checkpoint)
    if isinstance(checkpoint.weights, CompressedTensorsWeights):
        checkpoint.weights.check_shapes()
    skeleton = Skeleton(checkpoint)
    check_complete(checkpoint, skeleton, mtp)
    return checkpoint, skeleton


def check_unquantized(checkpoint: Checkpoint) -> None:
    """Raises InputError where a checkpoint's weights are neither FP8, floats nor what its makers released in 4 bits: it
    is quantized already."""
    found, family = format_of_config(checkpoint.config), FAMILIES[checkpoint.architecture]
    released = checkpoint.config.get("model_type") in family.packed_types and found is format_of("compressed-tensors")
    if found is not None and not (released and find_file(checkpoint.folder, RECORD_FILE) is None):
        raise InputError(
            f"{checkpoint.folder}: the model is already quantized ({found.name}); start from the FP8 or BF16 release"
        )


def _check_texts(recipe: Recipe) -> None:
    needing = next((name for name in recipe.to if format_of(name).needs_texts), None)
    if needing is not None and not recipe.calibration:
        more = f", as --activations {recipe.activations} wants it" if recipe.activations == "fp4" else ""
        raise UsageError(f"--calibration none: {needing} is calibrated{more}; name a text, or leave the option out")


def open_calibration(recipe: Recipe, tokenizer: Any) -> tuple[torch.Tensor | None, dict[str, Any] | None]:
    """Tokenizes the calibration texts: int64 [N, T], and their origin and hash; None twice without texts."""
    if not recipe.calibration:
        return None, None
    tokens = calibration_tokens(recipe.calibration, tokenizer, recipe.samples, recipe.seq_len, recipe.seed)
    calibration = {key: value for key, value in asdict(tokens).items() if key != "tokens"}
    return tokens.tokens, calibration | {"samples": len(tokens.tokens), "seq_len": tokens.tokens.shape[1]}


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """Loads a checkpoint's transformers tokenizer, which refuses texts with tokens that the embedding has no row for;
    raises InputError where it is missing or damaged."""
    tokenizer = load_tokenizer(checkpoint.folder)
    set_embedding_rows(tokenizer, checkpoint.weights.shape("model.embed_tokens.weight")[0])
    return tokenizer


def memory_budget(recipe: Recipe) -> int:
    """The recipe's budget in bytes, or the default."""
    return recipe.memory_budget or default_memory_budget()


def gpu_memory_budget(recipe: Recipe) -> int:
    """The GPU budget in bytes: the recipe's, or 90 % of what is free now, at most 16 GiB; 0 on a CPU."""
    if recipe.device != "cuda":
        return 0
    return recipe.gpu_memory_budget or min(LARGEST_DEFAULT_BUDGET, int(torch.cuda.mem_get_info()[0] * 0.9))


@contextmanager
def gpu_within_budget(budget_bytes: int) -> Iterator[None]:
    """Lets PyTorch take no more GPU memory than the budget inside a block; raises Interrupted where the block needs
    more. A budget of 0 stands for no GPU."""
    if not budget_bytes:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / torch.cuda.mem_get_info()[1]))
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Interrupted(
            f"the GPU budget of {format_size(budget_bytes)} is exceeded ({str(error).splitlines()[0][:200]}); "
            "continue with --resume and a larger --gpu-memory-budget"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
