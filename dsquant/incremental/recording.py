"""Opens an earlier output as a recording: its source's hashes, its scales, and how every weight was rounded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dsquant.errors import InputError, UsageError
from dsquant.files.foreign import find_file, read_file
from dsquant.files.sealing import broken_sections, hash_files
from dsquant.formats.safetensors_target import SafetensorsTarget
from dsquant.formats.scales import open_scales
from dsquant.jobs.folder_state import RECORD_FILE, found_in
from dsquant.model.families.mla import KEYS_AND_VALUES
from dsquant.model.skeleton import Skeleton
from dsquant.pipeline.planning import Plan, plan_run
from dsquant.recipes import Recipe
from dsquant.schemes import QuantizedWeight
from dsquant.source.checkpoint import Checkpoint
from dsquant.source.shards import ShardIndex, read_index
from dsquant.verification.damage import recorded_shards
from dsquant.verification.strict_record import read_record


@dataclass(frozen=True)
class Recording:
    """An opened output."""

    output: Path
    record: dict[str, Any]
    sha256: str
    """SHA-256 of dsquant.json."""

    @property
    def source_hashes(self) -> dict[str, str]:
        """Source tensor -> SHA-256."""
        hashes: dict[str, str] = self.record["source"]["tensors_sha256"]
        return hashes

    @property
    def is_part(self) -> bool:
        """Whether it is the folder of some of the formats that a job has written."""
        return len(self.record["outputs"]) < len(self.record["recipe"]["to"])

    def recipe(self, model: str, output: Path, whole: bool = False) -> Recipe:
        """Returns the recipe for another release under this recording's scales: on the CPU, and without evaluation; of
        the formats that are here, or of the `whole` job's.

        Records from before the option `kv_b` are of outputs whose kv_b_proj is quantized where the preset takes it.
        """
        fields = {**self.record["recipe"], "device": "cpu", "evaluate": False, "scales_from": self.sha256}
        if not whole:  # types of tensors are GGUF's
            fields |= {"to": list(self.record["outputs"]), "tensor_types": ()}
        linears = (linear for output in self.record["outputs"].values() for linear in output["weight_errors"])
        fields |= {"kv_b": "quantize"} if any(linear.endswith(KEYS_AND_VALUES.module) for linear in linears) else {}
        return Recipe.checked(**{**fields, "model": model, "output": output})


@dataclass(frozen=True)
class RecordedTarget:
    """One format of a recording."""

    recording: Recording
    target: SafetensorsTarget
    index: ShardIndex
    scales: ShardIndex
    errors: dict[str, float]
    """Linear -> recorded error."""

    def weight(self, linear: str) -> QuantizedWeight:
        """Reads a linear as it was rounded."""
        names = [tensor.name for tensor in self.target.format.stored(linear, (0, 0), self.target.grid)]
        tensors = {name: self.read(name) for name in names}
        return self.target.format.unpack(linear, tensors, self.target.grid)

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor, or its part of the stack that it lies in."""
        if name not in self.target.place_of:
            return self.index.read(name)
        stack, place = self.target.place_of[name]
        return self.index.read(stack, place, place + 1)[0]

    def hashes(self, file_name: str) -> dict[str, str]:
        """Returns tensor -> SHA-256 of a shard."""
        tensors = self.recording.record["files"][str(self.target.folder / file_name)]["tensors"]
        return {name: entry[1] for name, entry in tensors.items()}

    def intact(self, file_name: str) -> Path:
        """Returns the path of a shard; raises InputError where it is not as it was written."""
        name = str(self.target.folder / file_name)
        path = self.recording.output / name
        entry = self.recording.record["files"][name]
        there = find_file(self.recording.output, name) is not None
        found = hash_files(self.recording.output, [name], lambda _: None) if there else {}
        if found.get(name) != {key: entry[key] for key in ("bytes", "sha256")}:
            raise InputError(f"{path} is damaged; see `dsquant verify {self.recording.output}`")
        return path


def open_recording(output: Path) -> Recording:
    """Opens the output folder of `dsquant awq` or `delta`. Raises InputError where it is not a finished output or its
    record is damaged, UsageError where it holds GGUF files or has chosen widths, which are not requantized."""
    path = find_file(output, RECORD_FILE)
    if path is None or found_in(output) != "finished":
        raise InputError(
            f"{output} is not a finished output of dsquant ({RECORD_FILE} is missing, or a job is running)"
        )
    raw = read_file(path)
    if broken_sections(raw):
        raise InputError(f"{path} is damaged; see `dsquant verify {output}`")
    record = read_record(path)
    if record["recipe"].get("target_bits") or record["recipe"].get("target_size"):
        raise UsageError(
            f"{output} has chosen widths: `delta` does not support them yet; quantize the new release as a whole"
        )
    gguf = [name for name, entry in record["outputs"].items() if entry["folder"].endswith(".gguf")]
    if gguf:
        others = [entry["folder"] for name, entry in record["outputs"].items() if name not in gguf]
        advice = f"give the folder of another format, such as {output / others[0]}" if others else "convert anew"
        raise UsageError(f"{output} holds {', '.join(gguf)}, which `delta` does not make from another: {advice}")
    return Recording(output, record, hashlib.sha256(raw).hexdigest())


def grid_places(recording: Recording, plan: Plan, checkpoint: Checkpoint, skeleton: Skeleton) -> list[int]:
    """Returns the place of each planned grid among those of the record's layers, which list the whole job's."""
    if not recording.is_part:
        return list(range(len(plan.linears)))
    job = plan_run(recording.recipe("", recording.output, whole=True), checkpoint, skeleton)
    places = {target.name: list(job.linears).index(target.grid) for target in job.targets}
    found = {target.grid: places[target.name] for target in plan.targets}
    return [found[grid] for grid in plan.linears]


def recorded_targets(recording: Recording, plan: Plan) -> list[RecordedTarget]:
    """Pairs planned formats of a new release with a recording's; raises InputError where tensors, shapes or files
    differ."""
    paired = []
    for target in plan.targets:
        assert isinstance(target, SafetensorsTarget)
        folder = PurePosixPath(target.folder)
        before, now = recorded_shards(recording.record["files"], folder), target.shards
        if [(shard.file_name, shard.tensors) for shard in before.shards] != [
            (shard.file_name, shard.tensors) for shard in now.shards
        ]:
            raise InputError(
                f"{recording.output / folder}: the new release has other tensors or shapes than the one that this was "
                "made from; quantize it with `dsquant awq`"
            )
        directory = recording.output / folder
        errors = recording.record["outputs"][target.name]["weight_errors"]
        paired.append(RecordedTarget(recording, target, read_index(directory), open_scales(directory), errors))
    return paired
