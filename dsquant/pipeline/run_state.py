"""A running job, as every stage sees it: its recipe, source and folder, where hidden states lie, and whom it tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsquant.files.hashing import FileHashes
from dsquant.formats.protocol import OpenTarget
from dsquant.jobs.folder import Job
from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations, stored_dtype
from dsquant.model.passed_on import PassedOn
from dsquant.model.streaming import samples_together
from dsquant.pipeline.inputs import Source
from dsquant.recipes import Recipe
from dsquant.reporting.progress import Progress, Report, Stage
from dsquant.schemes import Scheme
from dsquant.source.scan import SourceHashes


@dataclass
class Run:
    """The state of a running job that every stage needs."""

    recipe: Recipe
    source: Source
    job: Job
    report: Report
    check: Callable[[], None]
    """Raises where the job has to stop here."""
    opened: Sequence[OpenTarget] = ()
    """Of each of the plan's targets, open once every tensor has its width."""
    ranks: Ranks = ALONE
    """Who does the job."""
    hashes: FileHashes = field(default_factory=FileHashes)
    """Of the output's files, made while these are written."""
    read: SourceHashes | None = None
    """Hashes the source while it is read; None where its tensors are hashed as the units are made (`delta`)."""
    passed_on: dict[Path, PassedOn] = field(default_factory=dict)
    """Hidden states that the layer before has left in memory, by the files in which they will be."""
    bytes_written: int = 0
    tokens_done: int = 0

    def safe_point(self, stage: Stage, done: int, total: int, what: str) -> None:
        """Tells where the job is, and stops it if it must."""
        self.check()
        self.tell(stage, done, total, what)

    def tell(self, stage: Stage, done: int, total: int, what: str, layer: dict[str, Any] | None = None) -> None:
        """Tells where the job is, and what came of a finished layer."""
        counts = (self.source.checkpoint.index.bytes_read, self.bytes_written, self.tokens_done)
        self.report(Progress(stage, done, total, what, *counts, layer=layer))

    @property
    def batch_samples(self) -> int:
        """Samples that pass attention together."""
        return samples_together(self.recipe.seq_len)

    def hidden_path(self, layer: int) -> Path:
        """The file of a layer's inputs, float32; bfloat16 where a GPU makes them."""
        return self.job.work / f"hidden-{layer}.f32"

    def quantized_path(self, layer: int, number: int) -> Path:
        """The file of what a layer gets in the model that is quantized onto the grid of this number."""
        return self.quantized_file(f"hidden-{layer}", number)

    def quantized_file(self, name: str, number: int) -> Path:
        """A file of the model that is quantized onto the grid of this number."""
        return self.job.work / f"{name}-quantized{f'-{number}' if number else ''}.f32"

    def kept_paths(self, layer: int) -> list[Path]:
        """The files that a layer reads."""
        followed = (self.quantized_path(layer, number) for number in range(len(self.followed)))
        return [self.hidden_path(layer), *followed]

    @property
    def followed(self) -> tuple[Scheme, ...]:
        """The grids whose models are followed, where calibration is sequential: linears are rounded for the inputs that
        the quantized model gives them."""
        plan = self.source.plan
        return tuple(plan.linears) if plan.quantizes and "follow" in self.recipe.steps else ()

    @property
    def device(self) -> torch.device:
        """Where the job computes."""
        return self.source.checkpoint.weights.device

    def activations(self, path: Path) -> Activations:
        """The activations in a file of the work folder."""
        return Activations.in_file(path, self._hidden_shape, self.device)

    def inputs(self, path: Path) -> Activations:
        """Opens a layer's inputs: in their file, or where the layer before has left them."""
        passed_on = self.passed_on.get(path)
        if passed_on is None:
            return self.activations(path)
        found = Activations.being_written(path, self._hidden_shape, self.device)
        found.passed_on = passed_on
        return found

    def mlp_inputs(self, layer: int, path: Path, inputs: Activations) -> Activations:
        """Opens what a layer's MLPs read: on the GPU where the plan has room for it there, else in a file. It takes the
        place of the layer's inputs where these are there too."""
        if layer not in self.source.plan.needs.gpu_resident:
            return self.activations(path)
        passed_on = inputs.passed_on
        if passed_on is None:
            return Activations(torch.zeros(self._hidden_shape, dtype=stored_dtype(self.device), device=self.device))
        found = Activations(passed_on.values_NTH)
        found.passed_on = passed_on
        return found

    def passes_on(self, layer: int) -> bool:
        """Returns whether a layer's outputs stay in memory for the next layer; several processes exchange them."""
        resident, next_layer = self.source.plan.needs.gpu_resident, layer + 1
        return self.ranks.size == 1 and {layer, next_layer} <= resident and next_layer < self.source.skeleton.num_layers

    def outputs(self, layer: int, path: Path) -> Activations:
        """Opens the float32 sums of a layer's outputs, which `save` writes into the named file."""
        if layer in self.source.plan.needs.gpu_resident:
            (first, end), (_, *shape) = self.own_samples, self._hidden_shape
            return Activations(torch.zeros(end - first, *shape, device=self.device), first_sample=first)
        return Activations.in_file(self.sums_path(path), self._hidden_shape, self.device, torch.float32)

    def sums_path(self, path: Path) -> Path:
        """The file in which outputs are summed that another keeps: the same where that keeps float32."""
        return path if stored_dtype(self.device) == torch.float32 else path.with_suffix(".sums.f32")

    def save(self, outputs: Activations, path: Path) -> None:
        """Writes this rank's samples of what a layer's outputs were summed in into the named file; `sync_file` then
        brings them to disk."""
        if outputs.path == path:
            outputs.flush()
        else:
            outputs.save(path, self.own_samples)

    @property
    def own_samples(self) -> tuple[int, int]:
        """This rank's samples in a layer's dense part: the first, and the one after the last."""
        shares = Shares(self._hidden_shape[0], self.batch_samples, self.ranks.size)
        return shares.samples(self.ranks.rank)

    @property
    def _hidden_shape(self) -> tuple[int, int, int]:
        assert self.source.tokens_NT is not None
        samples, tokens = self.source.tokens_NT.shape
        return samples, tokens, int(self.source.skeleton.config["hidden_size"])
