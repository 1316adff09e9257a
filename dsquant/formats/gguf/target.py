"""A GGUF model, planned from headers: every tensor with its type and its place, every file to the byte."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from dsquant.calibration.tokenizer import THEN
from dsquant.errors import InputError
from dsquant.escaping import counted
from dsquant.files.foreign import blaming
from dsquant.formats.gguf.files import GgufFile, GgufTensor, plan_files
from dsquant.formats.gguf.imatrix import TensorImportance
from dsquant.formats.gguf.layout import Placement, placements, stored_shape
from dsquant.formats.gguf.loader import loading_problem
from dsquant.formats.gguf.metadata import add_model_keys, add_tokenizer_keys
from dsquant.formats.gguf.mixtures import choose_type, model_facts
from dsquant.formats.gguf.rope import rope_factors, starting_options
from dsquant.formats.gguf.store import check_quantizer
from dsquant.formats.gguf.types import TARGET_KEY, file_type_of, scale_beside
from dsquant.model.families import family_of
from dsquant.model.skeleton import network_config, network_rotary
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint

IMATRIX_FILE = "imatrix.gguf"
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "model.embed_tokens.weight"
QUANTIZATION_VERSION = 2
# In the place of NVFP4 where llama.cpp reads no scale beside a tensor, and refuses a file that has one.
UNSCALED = "IQ4_NL"
FLOAT32_BYTES = 4
# Weights that are in memory together while a matrix is stored.
ELEMENTS_AT_ONCE = 2**24
# Parameters that are read from the disk while one is stored.
PARAMETERS_AHEAD = 6
# A parameter's error is measured on this many rows, evenly spaced: gguf-py decodes slowly.
ERROR_ROWS = 16


@dataclass(frozen=True)
class GgufModel:
    """A GGUF model to write."""

    type_name: str
    """Its name in `--type`."""
    config: Mapping[str, Any]
    """The network's, with transformers' defaults filled in."""
    tensors: Mapping[str, GgufTensor]
    files: tuple[GgufFile, ...]
    notes: tuple[str, ...]
    """Sentences for the user."""
    largest_whole: int
    """Weights of the largest parameter that is not stored in parts."""
    imatrix: Mapping[str, TensorImportance] | None = None
    """Importances from a file."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def starting_options(self) -> str:
        """What llama.cpp has to be started with."""
        return starting_options(self.config["rope_parameters"])

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Type -> bytes of its tensors, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.type_name] += tensor.num_bytes
        return dict(sizes.most_common())


def plan_model(
    checkpoint: Checkpoint,
    model_name: str,
    type_name: str,
    parameters: Sequence[str],
    num_mtp_layers: int,
    has_imatrix: bool,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    max_file_bytes: int = 0,
    label: str | None = None,
) -> GgufModel:
    """Plans every tensor and file of a GGUF model, to the byte.

    `parameters` are the source's that the model gets, in order, `num_mtp_layers` multi-token-prediction layers among
    them. A file holds at most `max_file_bytes` of tensor data, 0 makes one file; its name has `label` in place of the
    type. Raises InputError where a parameter has no place in GGUF, or the tokenizer is unknown to llama.cpp; UsageError
    where a type needs importances and there are none.
    """
    family = family_of(checkpoint.folder, checkpoint.config)
    config, rotary = network_config(family, checkpoint.config), network_rotary(family, checkpoint.config)
    shapes = loadable_shapes(checkpoint, parameters)
    tensors, replaced = choose_tensors(config, shapes, type_name, num_mtp_layers, has_imatrix, overrides)
    on_gpu = checkpoint.weights.device.type == "cuda"
    missing = check_quantizer({tensor.type_name for tensor in tensors.values()}, on_gpu, has_imatrix)
    left_out: list[str] = []

    def add_keys(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(model_name)
        add_model_keys(writer, family.gguf, config, rotary, num_mtp_layers)
        writer.add_file_type(file_type_of(type_name))
        writer.add_quantization_version(QUANTIZATION_VERSION)
        if label is not None:
            writer.add_string(TARGET_KEY, label)
        with blaming(checkpoint.folder / "tokenizer.json", THEN):
            names = family.gguf.pre_tokenizers
            left_out.extend(add_tokenizer_keys(writer, checkpoint.folder, int(config["vocab_size"]), names))

    stem = f"{model_name}-{label or type_name}"
    # gguf-py packs any value of the config into numbers of 32 bits.
    with blaming(checkpoint.folder / CONFIG_FILE, "take config.json from the same release as the weights"):
        files = plan_files(stem, family.gguf.architecture, add_keys, list(tensors.values()), max_file_bytes)
    notes = tuple(
        f"{counted(count, 'tensor')} stored as {chosen} instead of {wanted}: rows are not multiples of {wanted}'s block"
        for (wanted, chosen), count in replaced.items()
    )
    notes += tuple(filter(None, (missing, _starting_note(config))))
    if tokens := ", ".join(map(repr, left_out)):
        notes += (f"added tokens without a row in the embedding are left out of GGUF files: {tokens}",)
    return GgufModel(type_name, config, tensors, files, notes, largest_whole(checkpoint, parameters))


def _starting_note(config: Mapping[str, Any]) -> str | None:
    options = starting_options(config["rope_parameters"]).strip()
    return f"llama.cpp does not read yarn's bounds in a file: start it with `{options}` each time" if options else None


def choose_tensors(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    type_name: str,
    num_mtp_layers: int,
    has_imatrix: bool,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
) -> tuple[dict[str, GgufTensor], Counter[tuple[str, str]]]:
    """Gives every tensor (name -> shape, from `loadable_shapes`) its type, by a key of `MIXTURES` and
    `parse_overrides`.

    Returns the tensors in order, and how often a type was replaced: (wanted, chosen) -> tensors.
    """
    facts = model_facts(config, int(config["num_hidden_layers"]) + num_mtp_layers, "output.weight" not in shapes)
    tensors, replaced = {}, Counter[tuple[str, str]]()
    for name, shape in shapes.items():
        chosen, wanted = choose_type(name, shape, type_name, facts, has_imatrix, overrides)
        if scale_beside(name, chosen) and int(name.split(".")[1]) >= int(config["num_hidden_layers"]):
            chosen = UNSCALED  # llama.cpp looks for no scale in a layer of multi-token prediction
        tensors[name] = GgufTensor(name, chosen, shape)
        scale = scale_beside(name, chosen)
        if scale:
            tensors[scale] = GgufTensor(scale, "F32", shape[:-2] or (1,))
        if wanted:
            replaced[wanted, chosen] += 1
    return tensors, replaced


def loadable_shapes(checkpoint: Checkpoint, parameters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of a GGUF model with these parameters: name -> shape, columns last.

    Raises InputError where llama.cpp does not load such a model, or computes another function; or a parameter has no
    place in GGUF.
    """
    family = family_of(checkpoint.folder, checkpoint.config)
    config, rotary = network_config(family, checkpoint.config), network_rotary(family, checkpoint.config)
    problem = loading_problem(family.gguf, config, rotary)
    if problem:
        raise InputError(f"{checkpoint.folder / CONFIG_FILE}: not for GGUF: {problem}")
    factors = rope_factors(config)
    shapes = {} if factors is None else {ROPE_FACTORS: tuple(factors.shape)}
    for name in parameters:
        for placement in places_of(checkpoint, name):
            if placement.tensor not in shapes:
                shapes[placement.tensor] = stored_shape(checkpoint.weights.shape(name), placement, config)
    return shapes


def places_of(checkpoint: Checkpoint, parameter: str) -> tuple[Placement, ...]:
    """Returns the places of a parameter, none for a head that is the embedding too; raises InputError where GGUF has
    none."""
    if parameter == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
        return ()
    found = placements(parameter, checkpoint.architecture)
    if not found:
        raise InputError(
            f"{checkpoint.folder}: GGUF has no place for tensor {parameter!r} of {checkpoint.architecture}"
        )
    return found


def error_step(shape: tuple[int, ...], placement: Placement) -> int:
    """Returns the step between rows on which a parameter's error is measured; 1 where the file has them in another
    order."""
    return max(1, -(-shape[0] // ERROR_ROWS)) if placement.transform == "same" and len(shape) > 1 else 1


def storing_bytes(largest_whole: int) -> int:
    """Returns the memory for the parts of a weight while it is stored, or for one of `largest_whole` weights."""
    return 6 * FLOAT32_BYTES * max(ELEMENTS_AT_ONCE, largest_whole)


def largest_whole(checkpoint: Checkpoint, parameters: Sequence[str]) -> int:
    """Returns the weights of the largest parameter that is not stored in parts of bounded size."""
    sizes = (
        prod(checkpoint.weights.shape(name))
        for name in parameters
        for placement in places_of(checkpoint, name)
        if placement.transform != "same"
    )
    return max(sizes, default=0)
