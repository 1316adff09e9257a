"""GGUF as an output format: files that llama.cpp loads, their importance matrix, and their choice of types for a
target.

Shape legend: M matrices of a tensor, O out features, I in features, H heads, N rows of a head's keys.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch

from dsquant.errors import UsageError
from dsquant.files.disk import PARTIAL
from dsquant.formats.gguf.gguf_weights import open_gguf
from dsquant.formats.gguf.imatrix import TensorImportance, column_importance, fitting_imatrix, stored_tensors
from dsquant.formats.gguf.layout import decode_rotary, encode, join_keys_and_values
from dsquant.formats.gguf.store import decoded_rows, quantizer_name, stored_rows
from dsquant.formats.gguf.target import IMATRIX_FILE, GgufModel, places_of, plan_model, storing_bytes
from dsquant.formats.gguf.type_choice import TYPES_FILE, type_choice, type_lines
from dsquant.formats.gguf.types import MIXTURES, parse_overrides
from dsquant.formats.gguf.unit import OpenGguf
from dsquant.formats.protocol import Contents, Format, ScaledLinear, StoredFile, Surroundings, Target
from dsquant.formats.scales import SCALES_FILE
from dsquant.formats.wanted import PICTURE_FILE, Choice, Choosable, Wanted, Width
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import KEYS_SUFFIX
from dsquant.options import format_size
from dsquant.presets import Step
from dsquant.schemes import Grid, Scheme
from dsquant.schemes.ggml_types import GGML_TYPES
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.license import CARD_FILE
from dsquant.source.weights import Weights

# Scales are searched on this grid: 4 bits with scale and minimum for 32 weights, as Q4_K has.
SCALES_GRID = Grid(4, 32, False, rounded=False)
# With any of these steps, linears are rounded by them; else ggml's quantizers do it.
ROUNDING: frozenset[Step] = frozenset({"clip", "compensate", "descend"})


class Gguf(Format):
    """The format `gguf:TYPE`."""

    name = "gguf"
    help = "llama.cpp's, with AWQ's scales folded in"
    has_types = True
    needs_texts = False
    encoded_by_package = True
    decoder = ("gguf", "gguf.quants")
    placement = "split"
    placed = (
        "Q8_0",
        "Q6_K",
        "Q5_K_M",
        "Q4_K_M+",
        "Q4_K_M",
        "IQ4_XS",
        "Q3_K_M",
        "IQ3_XXS",
        "Q2_K",
        "IQ2_M",
        "IQ2_XXS",
        "IQ1_M",
    )
    on_disk = ("Q4_K_M", "IQ4_XS")
    # Their KL divergence was measured above 0.1: IQ2_XXS 0.22, IQ1_M lies between that and IQ1_S with 0.55.
    for_trials = ("IQ2_XXS", "IQ1_M")

    def stored_type(self, type_name: str) -> str | None:
        return MIXTURES[type_name]

    def serve_command(self, location: Path | str) -> str:
        return f"llama-server -m {location}"

    def plan(self, wanted: Wanted) -> "GgufTarget":
        """Plans every tensor and file.

        Raises InputError where a parameter has no place in GGUF, the tokenizer is unknown to llama.cpp, or an imatrix
        is of another model; UsageError where the type is unknown, nothing installed can make it, or scales cannot be
        searched.
        """
        recipe, type_name = wanted.recipe, wanted.name.partition(":")[2]
        if type_name not in MIXTURES:
            near = get_close_matches(type_name, MIXTURES, n=1)
            words = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"type {type_name!r} is unknown; {words}dsquant writes {', '.join(MIXTURES)}")
        if recipe.target is not None and not recipe.calibration:
            raise UsageError(
                f"{recipe.target}: types are chosen by what they do to the hidden states of calibration texts; give "
                "--calibration, and no --imatrix"
            )
        if recipe.imatrix and recipe.calibration:
            raise UsageError("give an imatrix file or a calibration text, not both")
        chosen = [(re.compile(f"^{re.escape(name)}$"), str(width)) for name, width in wanted.chosen.items()]
        model = plan_model(
            wanted.checkpoint,
            recipe.model_name,
            type_name,
            [name for parameters in wanted.parameters.values() for name in parameters],
            wanted.num_mtp_layers,
            bool(recipe.imatrix or recipe.calibration),
            [*parse_overrides(recipe.tensor_types), *chosen],
            recipe.split_max_bytes,
            recipe.target_name,
        )
        linears, notes = _searched(wanted)
        schemes = rounded_schemes(wanted.checkpoint, linears, model) if ROUNDING.intersection(recipe.steps) else {}
        notes = [*model.notes, *notes]
        if recipe.imatrix:
            imatrix, found = fitting_imatrix(recipe.imatrix, model.tensors)
            model, notes = replace(model, imatrix=imatrix), [*notes, *found]
        return GgufTarget(
            name=f"gguf:{recipe.target_name or type_name}",
            folder=wanted.folder,
            grid=replace(SCALES_GRID, output=wanted.name) if len(recipe.to) > 1 and schemes else SCALES_GRID,
            linears=linears,
            notes=tuple(notes),
            rounded_to=schemes,
            model=model,
            calibrated=bool(recipe.calibration),
            on_gpu=recipe.device == "cuda",
            chosen=bool(wanted.chosen),
        )


def _searched(wanted: Wanted) -> tuple[frozenset[str], list[str]]:
    """Returns the linears that are scaled or rounded, and notes where there are none, which GGUF as the only output
    allows."""
    recipe, alone = wanted.recipe, len(wanted.recipe.to) == 1
    if not recipe.calibration or (alone and not ({"scales", "follow"} | ROUNDING).intersection(recipe.steps)):
        return frozenset(), []
    linears, notes = scalable_linears(wanted.checkpoint, wanted.skeleton)
    if notes and not alone:
        raise UsageError(f"--to {wanted.name}: {notes[0]}; run `dsquant gguf` instead")
    return linears.intersection(linear for layer in wanted.layers for linear in layer.linears), notes


def rounded_schemes(checkpoint: Checkpoint, linears: Iterable[str], model: GgufModel) -> dict[str, Scheme]:
    """Returns the schemes of those linears that the quantization can round: linear -> its tensor's type.

    Not of those whose columns are another tensor's rows, and not of types that `GGML_TYPES` has not.
    """
    found: dict[str, Scheme] = {}
    for linear in linears:
        places = places_of(checkpoint, f"{linear}.weight")
        scheme = GGML_TYPES.get(model.tensors[places[0].tensor].type_name)
        if scheme is not None and [place.transform for place in places] in (["same"], ["rotary"]):
            found[linear] = scheme
    return found


def scalable_linears(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[frozenset[str], list[str]]:
    """Returns the linears that scales are searched for, those of every layer or none, and notes why none are."""
    linears = frozenset(linear for layer in skeleton.layers for linear in layer.linears)
    for linear in sorted(linears):
        columns = checkpoint.weights.shape(f"{linear}.weight")[1]
        if columns % SCALES_GRID.group_size:
            size = SCALES_GRID.group_size
            return frozenset(), [f"no scales are folded in: {linear} has {columns} columns, not a multiple of {size}"]
    return linears, []


@dataclass(frozen=True)
class GgufTarget(Target):
    """A GGUF model to write."""

    rounded_to: Mapping[str, Scheme]
    """Linear -> the type that the quantization rounds it to; ggml's quantizers round the rest."""
    model: GgufModel
    calibrated: bool
    """Whether importances are taken from calibration."""
    on_gpu: bool
    """Whether weights are quantized on a GPU, as far as it has kernels for their types."""
    chosen: bool = False
    """Whether types have been chosen for a target."""

    packages: ClassVar[tuple[str, ...]] = ("gguf",)

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return self.rounded_to

    @property
    def num_bytes(self) -> int:
        return self.model.num_bytes

    @property
    def location(self) -> PurePosixPath:
        return self.folder / self.model.files[0].file_name

    @property
    def storing_bytes(self) -> int:
        return storing_bytes(self.model.largest_whole)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The code that quantizes: jobs with the same words write the same bytes."""
        return {"quantizer": quantizer_name(self.on_gpu)}

    @property
    def bytes_by_file(self) -> dict[str, int]:
        return {file.file_name: file.num_bytes for file in self.model.files}

    @property
    def details(self) -> Mapping[str, str]:
        return {f"in {name}": format_size(size) for name, size in self.model.bytes_by_type.items()}

    def file_names(self) -> list[str]:
        names = [*(file.file_name for file in self.model.files), CARD_FILE]
        names += [IMATRIX_FILE, SCALES_FILE] if self.calibrated else []
        return names + ([TYPES_FILE, PICTURE_FILE] if self.chosen else [])

    @property
    def choice_lines(self) -> Mapping[str, str]:
        return {TYPES_FILE: type_lines(self.model.tensors.values())} if self.chosen else {}

    def open(self, surroundings: Surroundings, resumed: bool) -> OpenGguf:
        return OpenGguf(self.model, surroundings.output / self.folder, surroundings, resumed)

    def finished_files(self, output: Path, units: Sequence[str], tensors: Collection[str]) -> Iterable[StoredFile]:
        for file in self.model.files:
            path = output / self.folder / (file.file_name + PARTIAL)
            path = path if path.is_file() else path.with_name(file.file_name)
            offsets = file.offsets
            places = {
                tensor.name: (offsets[tensor.name], tensor.num_bytes)
                for tensor in file.tensors
                if tensor.name in tensors
            }
            yield StoredFile(path, file.header, file.num_bytes, places)

    def candidate(self, output: Path, checkpoint: Checkpoint) -> Weights:
        return open_gguf(output / self.location, checkpoint)

    def contents(self, hashes: Mapping[str, str], output: Path) -> Contents:
        found = {
            str(self.folder / file.file_name): {
                tensor.name: [tensor.type_name, hashes[tensor.name], *tensor.shape] for tensor in file.tensors
            }
            for file in self.model.files
        }
        if (output / self.folder / IMATRIX_FILE).is_file():
            found[str(self.folder / IMATRIX_FILE)] = stored_tensors(output / self.folder / IMATRIX_FILE)
        return {name: {"tensors": held} for name, held in found.items()}

    def recorded(self, errors: Mapping[str, float]) -> dict[str, Any]:
        return {
            "folder": str(self.location),
            "bytes": self.num_bytes,
            "bytes_by_type": self.model.bytes_by_type,
            "weight_errors": dict(errors),
            **({"serve_with": options} if (options := self.model.starting_options) else {}),
        }

    def choice(self, wanted: Wanted) -> Choice:
        return type_choice(self.model.tensors, wanted)

    def as_stored(self, checkpoint: Checkpoint, group: Choosable, width: Width, linear: ScaledLinear) -> torch.Tensor:
        """Stores a linear's weight in one of the tensors that it fills and reads it back; the others' rows stay
        exact."""
        parameter, config, weight_OI = f"{linear.name}.weight", self.model.config, linear.weight_OI
        placement = next(place for place in places_of(checkpoint, parameter) if place.tensor == group.name)
        matrices = encode(weight_OI, parameter, placement.transform, config)
        if matrices.dim() == 2:
            matrices = matrices.unsqueeze(0)
        known = linear.name + (KEYS_SUFFIX if placement.transform == "keys" else "")
        columns_MI: Sequence[torch.Tensor | None] = [None]
        if known in linear.importance:
            squares, count = linear.importance[known]
            sums_MI = squares.cpu().expand(len(matrices), -1)
            found_MI = column_importance(TensorImportance(sums_MI, torch.full((len(matrices),), float(count))))
            columns_MI = list(found_MI)
        rounded = torch.stack(
            [
                decoded_rows(stored_rows(matrix, str(width), columns_I), str(width)).to(weight_OI.device)
                for matrix, columns_I in zip(matrices, columns_MI, strict=True)
            ]
        )
        if placement.transform == "keys":
            return join_keys_and_values(rounded, encode(weight_OI, parameter, "values", config))
        if placement.transform == "values":
            return join_keys_and_values(encode(weight_OI, parameter, "keys", config), rounded)
        return decode_rotary(rounded[0], parameter, config) if placement.transform == "rotary" else rounded[0]
