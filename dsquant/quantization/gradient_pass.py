"""Runs the original forwards once and takes gradients of what it predicts back, layer by layer (`model.gradients`).

The hidden states of a few samples lie in files for as long as it takes. A pass that was interrupted starts over.

Shape legend: N samples, T tokens, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dsquant.jobs.ranks import ALONE, Ranks, Shares
from dsquant.model.activations import Activations
from dsquant.model.gated import GatedWeights
from dsquant.model.gradients import LayerStates, RoutedGradients, expert_gradients, head_gradients, layer_gradients
from dsquant.model.overlays import ResidentWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import Routing, embed
from dsquant.model.structure import DecoderLayer, Mlp
from dsquant.quantization.layer import check_outputs, run_original
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.layer_mlps import own_mlps
from dsquant.quantization.sharing import share_rows
from dsquant.source.weights import Weights


@dataclass(frozen=True)
class GradientPass:
    """The arguments of the pass, and its files."""

    skeleton: Skeleton
    weights: Weights
    tokens_NT: torch.Tensor
    """int64."""
    work: Path
    """The folder for hidden states."""
    batch_samples: int
    seed: int
    safe_point: Callable[[int, int, str], None]
    """Gets the steps done, those of the whole pass, and a module's name; may raise to stop."""
    ranks: Ranks = ALONE
    """Who shares it."""

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """Those of the decoder, first to last."""
        return self.skeleton.layers[: self.skeleton.num_layers]

    def opened(self, path: Path) -> Activations:
        """The hidden states, or their gradients, in a file, float32 [N, T, H]."""
        shape = (*self.tokens_NT.shape, int(self.skeleton.config["hidden_size"]))
        return Activations.in_file(path, shape, self.weights.device, torch.float32)

    def file(self, name: object) -> Activations:
        """Opens one of the pass's own files."""
        return self.opened(self.work / f"sensitivity-{name}.f32")

    def passing(self, done: int, what: str) -> None:
        """Tells what comes next."""
        self.safe_point(done, 2 * len(self.layers), what)

    def job_of(self, layer: DecoderLayer, inputs: Activations, outputs: Activations, done: int) -> LayerJob:
        """Returns what running a layer takes; no linear is quantized."""
        return LayerJob(
            skeleton=self.skeleton,
            layer=layer,
            weights=self.weights,
            inputs=inputs,
            outputs=outputs,
            mlp_inputs=self.file("mlp-inputs"),
            linears={},
            batch_samples=self.batch_samples,
            seed=self.seed,
            emit=lambda grid, name, value: None,
            safe_point=partial(self.passing, done),
            ranks=self.ranks,
        )

    def forwards(self) -> list[Activations]:
        """Returns the hidden states before every layer, and behind the last. Raises InputError where they are not
        finite."""
        hidden = [self.file(number) for number in range(len(self.layers) + 1)]
        self.ranks.once(lambda: self._begin(hidden[0]))
        for number, layer in enumerate(self.layers):
            job = self.job_of(layer, hidden[number], hidden[number + 1], number)
            job.safe_point(layer.prefix)
            routing = run_original(job).routing
            for _ in own_mlps(job, routing):
                pass
            job.ranks.together(partial(check_outputs, job))
        return hidden

    def _begin(self, hidden: Activations) -> None:
        embed(self.skeleton, self.weights, self.tokens_NT, hidden)
        hidden.flush()

    def predict(self, hidden: Activations) -> Activations:
        """Returns the gradients of the last hidden states, each sample's with a seed of its own."""
        gradients = self.file("gradients")
        shares = Shares(hidden.shape[0], self.batch_samples, self.ranks.size)
        for sample in range(*shares.samples(self.ranks.rank)):
            draws = torch.Generator().manual_seed(self.seed + sample)
            found = head_gradients(self.skeleton, self.weights, hidden.samples(sample, sample + 1), draws)
            gradients.set_samples(sample, found)
        share_rows(gradients, self.ranks, shares)
        return gradients

    def backwards(
        self, hidden: list[Activations], gradients: Activations, visit: Callable[[LayerJob, LayerStates], None]
    ) -> None:
        """Passes the layers from the last to the first; `visit` takes the gradients of a layer's outputs to its inputs.

        A layer's outputs may be overwritten there.
        """
        for number, layer in enumerate(reversed(self.layers)):
            states = LayerStates(hidden[layer.index], gradients, self.file("attended"))
            job = self.job_of(layer, states.inputs, hidden[layer.index + 1], len(self.layers) + number)
            visit(job, states)


def take_back(job: LayerJob, states: LayerStates, routing: Routing | None) -> None:
    """Takes the gradients of a layer's outputs back to its inputs, on every rank, once `run_original` has run;
    `job.outputs` is overwritten."""
    device, batches = job.weights.device, _batches(job)
    share_RE = torch.zeros(job.inputs.num_rows if routing else 0, len(job.layer.experts), device=device)

    def contribute(mlp: Mlp, expert: GatedWeights, rows_R: torch.Tensor, share_R: torch.Tensor) -> torch.Tensor:
        inputs_RH, outputs_RH = job.mlp_inputs.rows(rows_R), states.gradients.rows(rows_R)
        found_RH, share_RE[rows_R, mlp.expert] = expert_gradients(job.skeleton, expert, inputs_RH, share_R, outputs_RH)
        return found_RH

    for start, stop in batches:
        job.outputs.set_samples(start, torch.zeros(stop - start, *job.outputs.shape[1:], device=device))
    for _ in own_mlps(job, routing, contribute):
        pass
    routed = None
    if routing is not None:
        parts = job.ranks.gather(share_RE.cpu()) if job.ranks.size > 1 else [share_RE]
        routed = RoutedGradients(job.outputs, torch.stack(parts).sum(0).to(device))  # each has some columns
    job.ranks.barrier()  # gradients are overwritten once every rank has used them
    layer_gradients(job.skeleton, job.layer, ResidentWeights(job.weights), states, routed, batches)
    share_rows(states.attended, job.ranks, job.shares)
    share_rows(states.gradients, job.ranks, job.shares)


def _batches(job: LayerJob) -> list[tuple[int, int]]:
    first, end = job.shares.samples(job.ranks.rank)
    return [(start, min(start + job.batch_samples, end)) for start in range(first, end, job.batch_samples)]
