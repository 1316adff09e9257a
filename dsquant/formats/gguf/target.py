"""A GGUF output: planned from headers, and filled unit by unit."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from dsquant.calibration.tokenizer import THEN
from dsquant.errors import InputError
from dsquant.files.foreign import blaming
from dsquant.formats.gguf.files import GgufFile, GgufFiles, GgufTensor, plan_files
from dsquant.formats.gguf.imatrix import TensorImportance, column_importance
from dsquant.formats.gguf.layout import ARCHITECTURES, Placement, encode, placements, stored_shape
from dsquant.formats.gguf.loader import loading_problem
from dsquant.formats.gguf.metadata import add_model_keys, add_tokenizer_keys
from dsquant.formats.gguf.ranges import check_range
from dsquant.formats.gguf.rope import rope_factors
from dsquant.formats.gguf.store import check_quantizer, decoded_rows, stored_rows
from dsquant.formats.gguf.types import MIXTURES, choose_type, model_facts, row_bytes
from dsquant.model.families import family_of
from dsquant.model.skeleton import network_config, network_rotary
from dsquant.source.checkpoint import CONFIG_FILE, Checkpoint

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "model.embed_tokens.weight"
QUANTIZATION_VERSION = 2
# Weights that are in memory together while a matrix is stored.
ELEMENTS_AT_ONCE = 2**24
# A parameter's error is measured on this many rows, evenly spaced: gguf-py decodes slowly.
ERROR_ROWS = 16


@dataclass(frozen=True)
class GgufTarget:
    """One GGUF model to write."""

    type_name: str
    """What `--type` calls it."""
    config: Mapping[str, Any]
    """The network's, with transformers' defaults filled in."""
    tensors: Mapping[str, GgufTensor]
    files: tuple[GgufFile, ...]
    notes: tuple[str, ...]
    """What a user should know, in words."""
    largest_whole: int
    """Weights of the largest parameter that is not stored in parts."""
    label: str | None = None
    """What names say instead of the type, where types are chosen for a target."""

    @property
    def name(self) -> str:
        """What `--to` calls it, or the target."""
        return f"gguf:{self.label or self.type_name}"

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Type -> bytes of its tensors, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.type_name] += tensor.num_bytes
        return dict(sizes.most_common())


def plan_target(
    checkpoint: Checkpoint,
    model_name: str,
    type_name: str,
    parameters: Sequence[str],
    num_mtp_layers: int,
    has_imatrix: bool,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    max_file_bytes: int = 0,
    label: str | None = None,
) -> GgufTarget:
    """Plans every tensor and file of a GGUF model, to the byte.

    Args:
        checkpoint: the source.
        model_name: for file names and `general.name`.
        type_name: a key of `MIXTURES`.
        parameters: the source's parameters that the model gets, in order.
        num_mtp_layers: multi-token-prediction layers among them.
        has_imatrix: whether measured importances are used.
        overrides: types by pattern, from `parse_overrides`.
        max_file_bytes: the most tensor data in a file; 0 makes one file.
        label: what names say instead of the type.

    Returns:
        The plan.

    Raises:
        InputError: where a parameter has no place in GGUF, or the tokenizer is unknown to llama.cpp.
        UsageError: where nothing installed can quantize to a type.
    """
    family = family_of(checkpoint.folder, checkpoint.config)
    config, rotary = network_config(family, checkpoint.config), network_rotary(family, checkpoint.config)
    architecture = ARCHITECTURES[checkpoint.architecture]
    shapes = loadable_shapes(checkpoint, parameters, num_mtp_layers)
    tensors, replaced = choose_tensors(config, shapes, type_name, num_mtp_layers, has_imatrix, overrides)
    missing = check_quantizer(
        {tensor.type_name for tensor in tensors.values()}, checkpoint.weights.device.type == "cuda"
    )

    left_out: list[str] = []

    def add_keys(writer: Any) -> None:
        add_model_keys(writer, architecture, config, rotary, model_name, num_mtp_layers)
        writer.add_file_type(MIXTURES[type_name][1])
        writer.add_quantization_version(QUANTIZATION_VERSION)
        with blaming(checkpoint.folder / "tokenizer.json", THEN):
            left_out.extend(add_tokenizer_keys(writer, checkpoint.folder, int(config["vocab_size"])))

    stem = f"{model_name}-{label or type_name}"
    # gguf-py packs what the config says, whatever that is, into numbers of 32 bits.
    with blaming(checkpoint.folder / CONFIG_FILE, "take config.json from the same release as the weights"):
        files = plan_files(stem, architecture, add_keys, list(tensors.values()), max_file_bytes)
    notes = tuple(
        f"{count} tensors are {chosen} instead of {wanted}: their rows are not a multiple of {wanted}'s block"
        for (wanted, chosen), count in replaced.items()
    )
    notes += (missing,) if missing else ()
    if left_out:
        tokens = ", ".join(map(repr, left_out))
        notes += (f"added tokens without a row in the embedding are left out of GGUF files: {tokens}",)
    return GgufTarget(type_name, config, tensors, files, notes, largest_whole(checkpoint, parameters), label)


def choose_tensors(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    type_name: str,
    num_mtp_layers: int,
    has_imatrix: bool,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
) -> tuple[dict[str, GgufTensor], Counter[tuple[str, str]]]:
    """Gives every tensor of a GGUF model its type.

    Args:
        config: the network's, with transformers' defaults filled in.
        shapes: tensor -> shape, from `loadable_shapes`.
        type_name: a key of `MIXTURES`.
        num_mtp_layers: multi-token-prediction layers among them.
        has_imatrix: whether measured importances are used.
        overrides: types by pattern, from `parse_overrides`.

    Returns:
        The tensors in order, and how often a type was replaced: (wanted, chosen) -> tensors.
    """
    facts = model_facts(config, int(config["num_hidden_layers"]) + num_mtp_layers, "output.weight" not in shapes)
    tensors, replaced = {}, Counter[tuple[str, str]]()
    for name, shape in shapes.items():
        chosen, wanted = choose_type(name, shape, type_name, facts, has_imatrix, overrides)
        tensors[name] = GgufTensor(name, chosen, shape)
        if wanted:
            replaced[wanted, chosen] += 1
    return tensors, replaced


def loadable_shapes(
    checkpoint: Checkpoint, parameters: Sequence[str], num_mtp_layers: int
) -> dict[str, tuple[int, ...]]:
    """The tensors that parameters become in a GGUF model, if llama.cpp loads it and computes the same network.

    Args:
        checkpoint: the source.
        parameters: names of its parameters, in order.
        num_mtp_layers: multi-token-prediction layers among them.

    Returns:
        GGUF tensor -> shape, rows last but one as in the checkpoint.

    Raises:
        InputError: where llama.cpp does not load such a model, or computes another function.
    """
    family = family_of(checkpoint.folder, checkpoint.config)
    config, rotary = network_config(family, checkpoint.config), network_rotary(family, checkpoint.config)
    shapes = stored_shapes(checkpoint, config, parameters)
    problem = loading_problem(ARCHITECTURES[checkpoint.architecture], config, rotary, shapes, num_mtp_layers)
    if problem:
        raise InputError(f"{checkpoint.folder / CONFIG_FILE}: not for GGUF: {problem}")
    return shapes


def stored_shapes(
    checkpoint: Checkpoint, config: Mapping[str, Any], parameters: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors that parameters become in a GGUF model.

    Args:
        checkpoint: the source.
        config: its network's, with transformers' defaults filled in.
        parameters: names of its parameters, in order.

    Returns:
        GGUF tensor -> shape, rows last but one as in the checkpoint.

    Raises:
        InputError: where a parameter has no place in GGUF.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    factors = rope_factors(config)
    if factors is not None:
        shapes[ROPE_FACTORS] = tuple(factors.shape)
    for name in parameters:
        for placement in places_of(checkpoint, name):
            shapes[placement.tensor] = stored_shape(checkpoint.weights.shape(name), placement, config)
    return shapes


def places_of(checkpoint: Checkpoint, parameter: str) -> tuple[Placement, ...]:
    """Where a parameter goes; nowhere for a head that is the embedding too.

    Args:
        checkpoint: the source.
        parameter: its name.

    Returns:
        The placements.

    Raises:
        InputError: where GGUF has no place for it.
    """
    if parameter == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"):
        return ()
    found = placements(parameter, checkpoint.architecture)
    if not found:
        raise InputError(
            f"{checkpoint.folder}: GGUF has no place for tensor {parameter!r} of {checkpoint.architecture}"
        )
    return found


def error_step(shape: tuple[int, ...], placement: Placement) -> int:
    """Every how many rows of a parameter its error is measured; 1 where the file has them in another order."""
    return max(1, -(-shape[0] // ERROR_ROWS)) if placement.transform == "same" and len(shape) > 1 else 1


def largest_whole(checkpoint: Checkpoint, parameters: Sequence[str]) -> int:
    """The weights of the largest parameter that is not stored in parts of bounded size."""
    sizes = (
        prod(checkpoint.weights.shape(name))
        for name in parameters
        for placement in places_of(checkpoint, name)
        if placement.transform != "same"
    )
    return max(sizes, default=0)


@dataclass
class GgufUnitWriter:
    """Writes one unit's parameters into a target's files."""

    checkpoint: Checkpoint
    target: GgufTarget
    files: GgufFiles
    parameters: tuple[str, ...]
    imatrix: Mapping[str, TensorImportance] | None = None
    """Importances from a file."""
    observed: dict[str, TensorImportance] = field(default_factory=dict)
    """Tensor -> importance, noted before the tensor is written."""
    bytes_written: int = 0
    _losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Parameter -> squared error and squared norm of the rows that were measured."""
    _written: set[str] = field(default_factory=set)

    def note(self, parameter: str, squares: torch.Tensor, count: int, keys: bool = False) -> None:
        """Notes how much each input column of a parameter matters.

        Args:
            parameter: its name.
            squares: float32 [I], sums of squared inputs; [H, N] for the keys of kv_b_proj.
            count: tokens behind the sums.
            keys: whether they are of kv_b_proj's keys alone; of its values alone otherwise.
        """
        for placement in places_of(self.checkpoint, parameter):
            if (placement.transform == "keys") != keys:
                continue
            shape = self.target.tensors[placement.tensor].shape
            matrices = shape[0] if len(shape) == 3 else 1
            empty = TensorImportance(torch.zeros(matrices, shape[-1]), torch.zeros(matrices))
            entry = self.observed.setdefault(placement.tensor, empty)
            rows = slice(None) if placement.expert is None else slice(placement.expert, placement.expert + 1)
            entry.sums_MI[rows] = squares
            entry.counts_M[rows] = count

    def write(self, parameter: str, weight: torch.Tensor | None = None) -> None:
        """Stores a parameter wherever it goes, in parts of bounded size.

        Args:
            parameter: its name.
            weight: its values, float32; read from the source where None.
        """
        for placement in places_of(self.checkpoint, parameter):
            tensor = self.target.tensors[placement.tensor]
            in_rows = placement.transform == "same" and len(tensor.shape) > 1
            parts = self._rows(parameter, weight) if in_rows else self._matrices(parameter, weight, placement)
            start = 0
            if placement.expert is not None:
                start = placement.expert * tensor.shape[-2] * row_bytes(tensor.type_name, tensor.shape[-1])
            step, row = error_step(self.checkpoint.weights.shape(parameter), placement), 0
            for number, rows_RI in parts:
                check_range(self.checkpoint, parameter, tensor.type_name, rows_RI)
                stored = stored_rows(rows_RI, tensor.type_name, self._importance(tensor.name, placement, number))
                self.files.write(tensor.name, start, stored)
                measured = slice(-row % step, None, step)
                self._measure(parameter, tensor.type_name, rows_RI[measured].cpu(), stored[measured].cpu())
                start += stored.numel()
                row += len(rows_RI)
                self.bytes_written += stored.numel()
        self._written.add(parameter)

    def _measure(self, parameter: str, type_name: str, rows_RI: torch.Tensor, stored: torch.Tensor) -> None:
        if not len(rows_RI):
            return
        error, norm = self._losses.get(parameter, (0.0, 0.0))
        error += float((decoded_rows(stored, type_name) - rows_RI).square().double().sum())
        self._losses[parameter] = error, norm + float(rows_RI.square().double().sum())

    @property
    def weight_errors(self) -> dict[str, float]:
        """Parameter -> the stored rows' distance from the folded ones, over their norm, on the rows that count."""
        return {name: (error / norm) ** 0.5 if norm else 0.0 for name, (error, norm) in self._losses.items()}

    def _rows(self, parameter: str, weight: torch.Tensor | None) -> Iterable[tuple[int, torch.Tensor]]:
        num_rows, num_columns = self.checkpoint.weights.shape(parameter)
        at_once = max(1, ELEMENTS_AT_ONCE // num_columns)
        for start in range(0, num_rows, at_once):
            stop = min(start + at_once, num_rows)
            rows = self.checkpoint.weights.rows(parameter, start, stop) if weight is None else weight[start:stop]
            yield 0, rows

    def _matrices(
        self, parameter: str, weight: torch.Tensor | None, placement: Placement
    ) -> Iterable[tuple[int, torch.Tensor]]:
        whole = self.checkpoint.weights[parameter] if weight is None else weight
        whole = encode(whole, parameter, placement.transform, self.target.config)
        return enumerate(whole if whole.dim() == 3 else [whole.reshape(-1, whole.shape[-1])])

    def _importance(self, name: str, placement: Placement, matrix: int) -> torch.Tensor | None:
        """float32 [I] of one matrix of a tensor; None where nothing is known of it."""
        number = matrix if placement.expert is None else placement.expert
        if self.imatrix is not None and name in self.imatrix:
            return column_importance(self.imatrix[name])[number]
        entry = self.observed.get(name)
        if entry is None:
            return None
        if placement.expert is None:
            return column_importance(entry)[number]
        rows = slice(number, number + 1)  # the other experts are not known yet
        return column_importance(TensorImportance(entry.sums_MI[rows], entry.counts_M[rows]))[0]

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Stores the unit's parameters that have not been written."""
        factors = rope_factors(self.target.config) if EMBEDDING in self.parameters else None
        if factors is not None:
            self.files.write(ROPE_FACTORS, 0, factors.view(torch.uint8))
        for parameter in sorted(self.parameters, key=self._place):
            if parameter not in self._written:
                safe_point(parameter)
                self.write(parameter)

    def _place(self, parameter: str) -> tuple[str, int]:
        """Where it goes first: tensors grow expert by expert, whatever the order of the names."""
        return next(((one.tensor, one.expert or 0) for one in places_of(self.checkpoint, parameter)), ("", 0))

    def commit(self) -> dict[str, str]:
        """Brings the unit's tensors to disk; returns tensor -> SHA-256."""
        names = [placement.tensor for name in self.parameters for placement in places_of(self.checkpoint, name)]
        if EMBEDDING in self.parameters and ROPE_FACTORS in self.target.tensors:
            names.append(ROPE_FACTORS)
        return self.files.commit(list(dict.fromkeys(names)))
