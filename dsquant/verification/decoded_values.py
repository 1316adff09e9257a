"""Compares an output's weights with the source's: decoded by the format's own package, within the recorded error."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import torch

from dsquant.files.sealing import in_threads
from dsquant.formats.gguf.layout import placements
from dsquant.formats.gguf.target import error_step
from dsquant.formats.scales import recorded_fold
from dsquant.jobs.ranks import Ranks, dealt
from dsquant.model.overlays import Fold
from dsquant.model.skeleton import Skeleton
from dsquant.model.structure import DecoderLayer
from dsquant.source.checkpoint import Checkpoint, stored_parts
from dsquant.source.scan import scan_tensor
from dsquant.source.shards import ShardIndex
from dsquant.source.weights import Weights

# Parameters that are decoded without --all, evenly spaced over quantized and other ones.
SAMPLED_QUANTIZED, SAMPLED_OTHER = 24, 8
# The recorded error is of the same numbers; sums in another order differ by less than this.
RELATIVE_TOLERANCE, TOLERANCE = 1e-3, 1e-6
# An unquantized parameter differs at most by its storage type's rounding, relative to its norm.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 1e-6, "F64": 1e-6}
ROWS_AT_ONCE = 4096
# Weights that threads decode at a time: some 20 bytes of memory each.
WEIGHTS_TOGETHER = 2**27


@dataclass(frozen=True)
class OpenedOutput:
    """An opened output."""

    weights: Weights
    """Under the source's names, decoded by the format's package."""
    scales: ShardIndex
    errors: Mapping[str, float]
    """Linear -> recorded error; in GGUF parameter -> that of some rows, where the format has rounded it."""
    is_gguf: bool = False


@dataclass
class SourceComparison:
    """The source that outputs are compared with."""

    original: Checkpoint
    layers: Mapping[int, DecoderLayer]
    hashes: Mapping[str, str]
    """Source tensor -> recorded SHA-256."""
    _folds: dict[int, Fold] = field(default_factory=dict)

    def fold(self, candidate: OpenedOutput, name: str) -> Fold:
        """Returns the fold of the layer that a parameter belongs to."""
        if not name.startswith("model.layers."):
            return Fold()
        index = int(name.split(".")[2])
        fold = self._folds.get(index)  # of several threads, each of which may replace them
        if fold is None:
            fold = recorded_fold(self.layers[index], self.original.weights, candidate.scales)
            self._folds = {index: fold}
        return fold

    def is_recorded_source(self, name: str) -> bool:
        """Returns whether a parameter of the source is still the one that was quantized."""
        index = self.original.index
        parts = stored_parts(index, name)
        return bool(parts) and all(scan_tensor(index, index[part]) == self.hashes.get(part) for part in parts)


def share_of(candidate: OpenedOutput, chosen: list[str], ranks: Ranks) -> list[str]:
    """Returns this rank's parameters, in their order: about as many weights as any other rank's."""
    places = dealt([math.prod(candidate.weights.shape(name)) for name in chosen], ranks.size)[ranks.rank]
    return [chosen[place] for place in sorted(places)]


def compared_source(
    original: Checkpoint | None, record: dict[str, Any], candidate: OpenedOutput, chosen: list[str], ranks: Ranks
) -> tuple[SourceComparison | None, str | None]:
    """Returns the source where it is there and still the recorded one, and the problem where it is a different one."""
    if original is None:
        return None, None
    layers = {layer.index: layer for layer in Skeleton(original).layers}
    comparison = SourceComparison(original, layers, record["source"]["tensors_sha256"])
    own = in_threads(comparison.is_recorded_source, share_of(candidate, chosen, ranks), lambda name: None)
    same = {name: one for part in ranks.gather(own) for name, one in part.items()}
    other = next((name for name in chosen if not same[name]), None)
    if other is None:
        return comparison, None
    problem = f"{original.folder}: tensor {other!r} is not the one that the output was made from (the hash differs)"
    return None, f"{problem}; name the original release"


def chosen_parameters(candidate: OpenedOutput, everything: bool) -> list[str]:
    """Returns the parameters to compare, in the order of the model."""
    names = list(candidate.weights)
    if everything:
        return names
    quantized = [name for name in names if _recorded_error(candidate, name) is not None]
    other = [name for name in names if _recorded_error(candidate, name) is None]
    picked = {*_spread(quantized, SAMPLED_QUANTIZED), *_spread(other, SAMPLED_OTHER)}
    return [name for name in names if name in picked]


def _spread(names: list[str], count: int) -> list[str]:
    return [names[len(names) * place // count] for place in range(count)] if len(names) > count else names


def _recorded_error(candidate: OpenedOutput, name: str) -> float | None:
    found = candidate.errors.get(name)
    return candidate.errors.get(name.removesuffix(".weight")) if found is None else found


class _Room:
    """Bounds what threads hold at a time; what is larger than the room is alone in it."""

    def __init__(self, size: int) -> None:
        self._size, self._taken, self._changed = size, 0, Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self._size)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


def problems_of(
    weights: Weights, names: Iterable[str], check: Callable[[str], str | None], after: Callable[[str], None]
) -> dict[str, str]:
    """Checks parameters in several threads; returns parameter -> problem where `check` finds one, or a parameter cannot
    be decoded for it.

    `after` is called with each name when it is done, from the calling thread; it may raise to stop.
    """
    room = _Room(WEIGHTS_TOGETHER)

    def problem_of(name: str) -> str | None:
        torch.set_num_threads(1)  # of this thread's operations
        with room.taken(math.prod(weights.shape(name))):
            try:
                return check(name)
            except ImportError:
                raise
            except Exception as error:  # the format's own package may raise anything
                return f"does not decode: {error}"

    found = in_threads(problem_of, names, after)
    return {name: problem for name, problem in found.items() if problem is not None}


def undecodable(candidate: OpenedOutput, name: str) -> str | None:
    """Returns what is wrong with a parameter's decoded values where there is no source to compare with."""
    return None if candidate.weights[name].isfinite().all() else "decodes to NaN or infinity"


def wrong_value(comparison: SourceComparison, candidate: OpenedOutput, name: str) -> str | None:
    """Decodes a parameter and returns its difference from the source, in words; None within the recorded error."""
    recorded, stored = _recorded_error(candidate, name), comparison.original.index.get(name)
    dtype = "BF16" if stored is None or stored.dtype.startswith("F8") else stored.dtype
    error = _error(comparison, candidate, name)
    if recorded is None:
        limit = ROUNDING[dtype]
        within = error <= limit
        return None if within else f"differs from the source by {error:.2e} of its norm, expected at most {limit:.1e}"
    within = abs(error - recorded) <= RELATIVE_TOLERANCE * recorded + TOLERANCE
    return None if within else f"its error is {error:.6f} of the source's norm, recorded {recorded:.6f}"


def _error(comparison: SourceComparison, candidate: OpenedOutput, name: str) -> float:
    """Returns the distance of the decoded parameter from the folded source, over the norm of that."""
    original, fold = comparison.original, comparison.fold(candidate, name)
    squared_error = squared_norm = 0.0
    for wanted, found in _parts(original, candidate, name, fold):
        squared_error += float((found - wanted).square().sum(dtype=torch.float64))
        squared_norm += float(wanted.square().sum(dtype=torch.float64))
    return (squared_error / squared_norm) ** 0.5 if squared_norm else squared_error**0.5


def _parts(original: Checkpoint, candidate: OpenedOutput, name: str, fold: Fold) -> Iterable[tuple[Any, Any]]:
    shape = original.weights.shape(name)
    by_format = candidate.is_gguf and name in candidate.errors  # a linear's own name: measured on all rows
    step = error_step(shape, placements(name, original.architecture)[0]) if by_format else 1
    if step > 1:
        for row in range(0, shape[0], step):
            wanted = original.weights.rows(name, row, row + 1)
            yield fold.apply(name, wanted, row), candidate.weights.rows(name, row, row + 1)
    elif name in fold or name.removesuffix(".weight") in candidate.errors or len(shape) < 2:
        yield fold.apply(name, original.weights[name]), candidate.weights[name]
    else:
        for row in range(0, shape[0], ROWS_AT_ONCE):
            rows = (row, min(row + ROWS_AT_ONCE, shape[0]))
            yield original.weights.rows(name, *rows), candidate.weights.rows(name, *rows)
