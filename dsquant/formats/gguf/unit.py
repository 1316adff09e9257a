"""A GGUF output that is being written: its files, filled unit by unit, and the importance matrix next to them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from dsquant.formats.gguf.block_bytes import packed
from dsquant.formats.gguf.files import GgufTensor, OpenGgufFiles
from dsquant.formats.gguf.float_blocks import nvfp4_scale
from dsquant.formats.gguf.imatrix import TensorImportance, column_importance, write_imatrix
from dsquant.formats.gguf.layout import Placement, encode
from dsquant.formats.gguf.ranges import check_range
from dsquant.formats.gguf.released_int4 import Q4_0, released_codes
from dsquant.formats.gguf.rope import rope_factors
from dsquant.formats.gguf.store import decoded_rows, stored_rows
from dsquant.formats.gguf.target import (
    ELEMENTS_AT_ONCE,
    EMBEDDING,
    FLOAT32_BYTES,
    IMATRIX_FILE,
    PARAMETERS_AHEAD,
    ROPE_FACTORS,
    GgufModel,
    error_step,
    places_of,
)
from dsquant.formats.gguf.types import row_bytes, scale_beside
from dsquant.formats.protocol import OpenTarget, Surroundings, UnitWriter
from dsquant.model.structure import KEYS_SUFFIX
from dsquant.schemes import QuantizedWeight


class OpenGguf(OpenTarget):
    """GGUF files that are being filled."""

    def __init__(self, model: GgufModel, folder: Path, surroundings: Surroundings, resumed: bool) -> None:
        self._model, self._surroundings, self._folder = model, surroundings, folder
        self._files = OpenGgufFiles(folder, model.files, resumed, surroundings)

    def unit(self, name: str, parameters: tuple[str, ...]) -> "GgufUnitWriter":
        return GgufUnitWriter(self._surroundings, self._model, self._files, parameters)

    def finish(self, kept: Iterable[Mapping[str, torch.Tensor]], calibration: Mapping[str, Any] | None) -> None:
        """Gives the files their names and writes the calibration's importances, as `llama-quantize` accepts them."""
        self._files.finish()
        if calibration is None:
            return
        entries: dict[str, TensorImportance] = {}
        for flat in kept:
            for name in (key.removesuffix(".sums") for key in flat if key.endswith(".sums")):
                entries[name] = TensorImportance(flat[f"{name}.sums"], flat[f"{name}.counts"])
        datasets = [source["name"] for source in calibration["sources"]]
        write_imatrix(self._folder / IMATRIX_FILE, entries, datasets, calibration["samples"], calibration["seq_len"])

    def close(self) -> None:
        self._files.close()


def _start(tensor: GgufTensor, placement: Placement) -> int:
    """Returns where the bytes of a parameter begin in its tensor."""
    if placement.expert is None:
        return 0
    return placement.expert * tensor.shape[-2] * row_bytes(tensor.type_name, tensor.shape[-1])


class GgufUnitWriter(UnitWriter):
    """Writes one unit's parameters into the files of a model."""

    def __init__(
        self, surroundings: Surroundings, model: GgufModel, files: OpenGgufFiles, parameters: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._surroundings, self._checkpoint, self._ranks = surroundings, surroundings.checkpoint, surroundings.ranks
        self._model, self._files, self._parameters = model, files, parameters
        self._observed: dict[str, TensorImportance] = {}
        self._losses: dict[str, tuple[float, float]] = {}
        """Parameter -> squared error and squared norm of the rows that were measured."""
        self._written: set[str] = set()

    def note(self, linear: str, squares: torch.Tensor, count: int) -> None:
        keys = linear.endswith(KEYS_SUFFIX)
        for placement in places_of(self._checkpoint, f"{linear.removesuffix(KEYS_SUFFIX)}.weight"):
            if (placement.transform == "keys") != keys:
                continue
            shape = self._model.tensors[placement.tensor].shape
            matrices = shape[0] if len(shape) == 3 else 1
            empty = TensorImportance(torch.zeros(matrices, shape[-1]), torch.zeros(matrices))
            entry = self._observed.setdefault(placement.tensor, empty)
            rows = slice(None) if placement.expert is None else slice(placement.expert, placement.expert + 1)
            entry.sums_MI[rows] = squares
            entry.counts_M[rows] = count

    def write(self, name: str, value: QuantizedWeight | torch.Tensor | None = None) -> None:
        """Stores a parameter wherever it goes, in parts of bounded size; without a value it is read from the source.

        A linear that is rounded already comes with its own name, without `.weight`.
        """
        if isinstance(value, QuantizedWeight):
            self._write_rounded(f"{name}.weight", value)
            return
        released = self._released_codes(name) if value is None else None
        if released is not None:
            self._write_rounded(name, released)
            return
        for placement in places_of(self._checkpoint, name):
            tensor = self._model.tensors[placement.tensor]
            in_rows = placement.transform == "same" and len(tensor.shape) > 1
            parts = self._rows(name, value) if in_rows else self._matrices(name, value, placement)
            start = _start(tensor, placement)
            scale = self._scale(name, value, placement, tensor.type_name)
            step, row = error_step(self._checkpoint.weights.shape(name), placement), 0
            for number, rows_RI in parts:
                check_range(self._checkpoint, name, tensor.type_name, rows_RI)
                importance_I = self._importance(tensor.name, placement, number)
                stored = stored_rows(rows_RI, tensor.type_name, importance_I, scale)
                measured = slice(-row % step, None, step)
                self._surroundings.hand_over(
                    (stored, stored[measured].contiguous(), rows_RI[measured].contiguous()),
                    partial(self._store, tensor.name, start),
                    partial(self._hash, tensor.name, start),
                    partial(self._measure, name, (tensor.type_name, scale)),
                )
                start += stored.numel()
                row += len(rows_RI)
                self.bytes_written += stored.numel()
        self._written.add(name)

    def _write_rounded(self, parameter: str, weight: QuantizedWeight) -> None:
        (placement,) = places_of(self._checkpoint, parameter)
        tensor, stored = self._model.tensors[placement.tensor], packed(weight)
        stored = encode(stored, parameter, placement.transform, self._model.config).contiguous()
        start = _start(tensor, placement)
        sinks = (partial(self._store, tensor.name, start), partial(self._hash, tensor.name, start))
        self._surroundings.hand_over((stored,), *sinks)
        self.bytes_written += stored.numel()
        self._written.add(parameter)

    def _released_codes(self, parameter: str) -> QuantizedWeight | None:
        """Returns a weight that is released in groups of 32 integers of 4 bits and goes into a tensor of Q4_0, in just
        these; None for any other."""
        places = places_of(self._checkpoint, parameter)
        if not places or self._model.tensors[places[0].tensor].type_name != Q4_0.name:
            return None
        weight = released_codes(self._checkpoint, parameter)
        if weight is not None:
            check_range(self._checkpoint, parameter, Q4_0.name, weight.scales_OG)
            released_OI = weight.dequantize()
            error_OI = replace(weight, scales_OG=weight.scales_OG.half().float()).difference(released_OI)
            error, norm = (float(part.square().double().sum()) for part in (error_OI, released_OI))
            self._losses[parameter] = error, norm
        return weight

    def _scale(self, parameter: str, weight: torch.Tensor | None, placement: Placement, type_name: str) -> float:
        """Stores the scale of a matrix beside it, where the file has one, and returns it; 1 elsewhere."""
        name = scale_beside(placement.tensor, type_name)
        if name is None:
            return 1.0
        largest = max(float(rows_RI.abs().max()) for _, rows_RI in self._rows(parameter, weight))
        scale = nvfp4_scale(largest)
        place = (name, FLOAT32_BYTES * (placement.expert or 0))
        sinks = (partial(self._store, *place), partial(self._hash, *place))
        self._surroundings.hand_over((torch.tensor([scale]).view(torch.uint8),), *sinks)
        return scale

    def _store(self, tensor: str, start: int, stored: torch.Tensor, *_: torch.Tensor) -> None:
        self._files.store(tensor, start, stored)

    def _hash(self, tensor: str, start: int, stored: torch.Tensor, *_: torch.Tensor) -> None:
        self._files.hash(tensor, start, stored)

    def _measure(
        self, parameter: str, kind: tuple[str, float], _: torch.Tensor, stored: torch.Tensor, rows_RI: torch.Tensor
    ) -> None:
        """Adds the rows' errors; `kind` is their type and the scale of their matrix."""
        if not len(rows_RI):
            return
        error, norm = self._losses.get(parameter, (0.0, 0.0))
        error += float((decoded_rows(stored, kind[0]).mul_(kind[1]) - rows_RI).square().double().sum())
        self._losses[parameter] = error, norm + float(rows_RI.square().double().sum())

    @property
    def weight_errors(self) -> dict[str, float]:
        """Parameter -> the stored rows' distance from the folded ones, over their norm, on the measured rows; of those
        that are rounded here."""
        return {name: (error / norm) ** 0.5 if norm else 0.0 for name, (error, norm) in self._losses.items()}

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """The importances that were noted."""
        flat: dict[str, torch.Tensor] = {}
        for name, entry in self._observed.items():
            flat |= {f"{name}.sums": entry.sums_MI, f"{name}.counts": entry.counts_M}
        return flat

    def _rows(self, parameter: str, weight: torch.Tensor | None) -> Iterable[tuple[int, torch.Tensor]]:
        num_rows, num_columns = self._checkpoint.weights.shape(parameter)
        at_once = max(1, ELEMENTS_AT_ONCE // num_columns)
        for start in range(0, num_rows, at_once):
            stop = min(start + at_once, num_rows)
            rows = self._checkpoint.weights.rows(parameter, start, stop) if weight is None else weight[start:stop]
            yield 0, rows

    def _matrices(
        self, parameter: str, weight: torch.Tensor | None, placement: Placement
    ) -> Iterable[tuple[int, torch.Tensor]]:
        whole = self._checkpoint.weights[parameter] if weight is None else weight
        whole = encode(whole, parameter, placement.transform, self._model.config)
        return enumerate(whole if whole.dim() == 3 else [whole.reshape(-1, whole.shape[-1])])

    def _importance(self, name: str, placement: Placement, matrix: int) -> torch.Tensor | None:
        """Returns float32 [I] of one matrix of a tensor; None where nothing is known of it."""
        number = matrix if placement.expert is None else placement.expert
        if self._model.imatrix is not None and name in self._model.imatrix:
            return column_importance(self._model.imatrix[name])[number]
        entry = self._observed.get(name)
        if entry is None:
            return None
        if placement.expert is None:
            return column_importance(entry)[number]
        rows = slice(number, number + 1)  # the other experts are not known yet
        return column_importance(TensorImportance(entry.sums_MI[rows], entry.counts_M[rows]))[0]

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        """Stores the unit's parameters that no rank has written, each rank its share."""
        ranks = self._ranks
        factors = rope_factors(self._model.config) if EMBEDDING in self._parameters else None
        if factors is not None and ranks.first:
            stored = factors.view(torch.uint8)
            self._surroundings.hand_over(
                (stored,), partial(self._store, ROPE_FACTORS, 0), partial(self._hash, ROPE_FACTORS, 0)
            )
        self._share_importances()
        written = set[str]().union(*ranks.gather(self._written))
        rest = sorted((name for name in self._parameters if name not in written), key=self._place)
        own = rest[ranks.rank :: ranks.size]
        for place, parameter in enumerate(own):
            safe_point(parameter)
            self._checkpoint.weights.prefetch(self._ahead(own[place + 1 :]))
            self.write(parameter)
        self._surroundings.wait()
        losses = {name: loss for part in ranks.gather(self._losses) for name, loss in part.items()}
        self._losses = {name: losses[name] for name in self._parameters if name in losses}

    def _ahead(self, parameters: Sequence[str]) -> list[str]:
        """The next parameters that are not read in parts, as many as are read while another is stored."""
        sizes = {name: prod(self._checkpoint.weights.shape(name)) for name in parameters[:PARAMETERS_AHEAD]}
        return [name for name, size in sizes.items() if size <= ELEMENTS_AT_ONCE]

    def _share_importances(self) -> None:
        """Gives every rank what all have noted: each matrix is noted by one of them, elsewhere it is zero."""
        observed: dict[str, TensorImportance] = {}
        for part in self._ranks.gather(self._observed):
            for name, entry in part.items():
                sums = observed.get(name)
                observed[name] = TensorImportance(
                    entry.sums_MI if sums is None else entry.sums_MI + sums.sums_MI,
                    entry.counts_M if sums is None else entry.counts_M + sums.counts_M,
                )
        self._observed = observed

    def _place(self, parameter: str) -> tuple[int, int]:
        """Returns the first place of a parameter in the model: its tensor's number, and its expert in it."""
        order = {name: number for number, name in enumerate(self._model.tensors)}
        return next(((order[one.tensor], one.expert or 0) for one in places_of(self._checkpoint, parameter)), (0, 0))

    def commit(self) -> dict[str, str]:
        placed = [placement.tensor for name in self._parameters for placement in places_of(self._checkpoint, name)]
        scales = (scale_beside(name, self._model.tensors[name].type_name) for name in placed)
        names = placed + [name for name in scales if name]
        if EMBEDDING in self._parameters and ROPE_FACTORS in self._model.tensors:
            names.append(ROPE_FACTORS)
        self._surroundings.wait()
        return self._files.commit(list(dict.fromkeys(names)))

    def discard(self) -> None:
        """Leaves the files as they are: a unit that is not journaled is written again."""
        self._surroundings.drop()
