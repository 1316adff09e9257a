"""Writes a checkpoint of safetensors shards, unit by unit."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from dsquant.files.disk import PARTIAL, copy_file, naming, write_atomically
from dsquant.formats.output_shards import ShardFile, write_index
from dsquant.formats.protocol import OpenTarget, Surroundings, UnitWriter
from dsquant.formats.unquantized import changed_tensors, unchanged_rows
from dsquant.schemes import QuantizedWeight
from dsquant.source.checkpoint import CONFIG_FILE

if TYPE_CHECKING:
    from dsquant.formats.safetensors_target import SafetensorsTarget


class ShardWriter(UnitWriter):
    """Writes one unit's tensors into its shards."""

    def __init__(
        self, target: "SafetensorsTarget", surroundings: Surroundings, unit: str, parameters: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._target, self._surroundings, self._parameters = target, surroundings, parameters
        begins, folder = surroundings.ranks.first, surroundings.output / target.folder
        self._shards = [ShardFile(folder, shard, begins) for shard in target.shards.shards_of(unit)]
        self._shard_of = {tensor.name: shard for shard in self._shards for tensor in shard.plan.tensors}
        self._written: set[str] = set()
        self._largest: dict[str, torch.Tensor] = {}

    def note_largest(self, linear: str, largest: torch.Tensor) -> None:
        if linear in self._target.linears:
            self._largest[linear] = largest

    def write(self, name: str, value: QuantizedWeight | torch.Tensor) -> None:
        if isinstance(value, QuantizedWeight):
            self._write_rows(self._target.format.pack(name, value))
            self._written.add(f"{name}.weight")
            return
        self._write_rows(changed_tensors(self._target, self._surroundings.checkpoint, name, value))
        self._written.add(name)

    def _write_rows(self, tensors: Mapping[str, torch.Tensor], start: int = 0) -> None:
        """Hands over rows of tensors, by name, from row `start` of each on: together, since threads cost time too."""
        places = [self._target.place_of.get(name, (name, None)) for name in tensors]

        def store(*parts: torch.Tensor) -> None:
            for (stored, place), rows in zip(places, parts, strict=True):
                self._shard_of[stored].store_rows(stored, start, place, rows)

        def hashed(*parts: torch.Tensor) -> None:
            for (stored, place), rows in zip(places, parts, strict=True):
                self._shard_of[stored].hash_rows(stored, start, place, rows)

        self._surroundings.hand_over(tuple(rows.detach() for rows in tensors.values()), store, hashed)
        self.bytes_written += sum(rows.nbytes for rows in tensors.values())

    def copy_rest(self, safe_point: Callable[[str], None]) -> None:
        checkpoint, ranks = self._surroundings.checkpoint, self._surroundings.ranks
        written = set[str]().union(*ranks.gather(self._written))
        rest = [name for name in self._parameters if name not in written]
        for name in rest[ranks.rank :: ranks.size]:
            safe_point(name)
            for stored_name, start, rows in unchanged_rows(self._target, checkpoint, name):
                self._write_rows({stored_name: rows}, start)
        if self._target.grid.noted:
            self._write_input_scales()

    def _write_input_scales(self) -> None:
        """Writes the scales of inputs, which all ranks' experts have a part in."""
        target, ranks = self._target, self._surroundings.ranks
        numbers = torch.stack(list(self._largest.values())).tolist() if self._largest else []
        largest: dict[str, float] = {}
        for part in ranks.gather(dict(zip(self._largest, numbers, strict=True))):
            for linear, found in part.items():
                alike = target.alike.get(linear, linear)
                largest[alike] = max(largest.get(alike, 0.0), found)
        linears = [name.removesuffix(".weight") for name in self._parameters] if ranks.first else []
        for linear in filter(target.linears.__contains__, linears):
            scale = target.format.input_scale(linear, largest[target.alike.get(linear, linear)])
            self._write_rows(scale)

    def commit(self) -> dict[str, str]:
        self._surroundings.wait()
        ranks = self._surroundings.ranks
        written = ranks.gather([shard.sync() for shard in self._shards])

        def publish() -> dict[str, str]:
            parts = zip(self._shards, *written, strict=True)
            hashes = {name: found for shard, *own in parts for name, found in shard.publish(*own).items()}
            for shard in self._shards:
                self._surroundings.written(shard.path, 0, shard.plan.num_bytes)
            return hashes

        return ranks.once(publish)

    def discard(self) -> None:
        self._surroundings.drop()
        for shard in self._shards:
            shard.discard()


class OpenCheckpoint(OpenTarget):
    """A checkpoint that is being written."""

    def __init__(self, target: "SafetensorsTarget", surroundings: Surroundings) -> None:
        self.target = target
        self._surroundings = surroundings
        self._folder = surroundings.output / target.folder

    def unit(self, name: str, parameters: tuple[str, ...]) -> ShardWriter:
        self._folder.mkdir(exist_ok=True)
        return ShardWriter(self.target, self._surroundings, name, parameters)

    def finish(self, kept: Iterable[Mapping[str, torch.Tensor]], calibration: Mapping[str, Any] | None) -> None:
        """Copies files, and writes config.json and the index."""
        for name in self.target.copied:
            partial_file = self._folder / (name + PARTIAL)
            with naming(self._folder / name):
                copy_file(self._surroundings.checkpoint.folder / name, partial_file)
            partial_file.replace(self._folder / name)
        content = json.dumps(self.target.config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._folder / CONFIG_FILE, content.encode())
        write_index(self._folder, self.target.shards)
