"""Chooses the tokens that each MLP of a layer is judged on.

Shape legend: R tokens, H hidden size, E experts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dsquant.jobs.ranks import Ranks
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import DecoderLayer, Mlp
from dsquant.presets import Step
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.statistics import InputMoments, InputStatistics
from dsquant.source.weights import Weights

# An expert with fewer tokens than this also gets those that the router scores highest for it besides its own.
FEWEST_TOKENS = 256
# A gated MLP's own output error is measured on at most this many tokens, evenly spaced.
CHECK_ROWS = 512
# Of a hidden state's mean square: padding may be zero.
LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class MlpInputs:
    """The tokens that an MLP is judged on, and what it reads there."""

    activations: Activations
    """The normed hidden states of all tokens."""
    rows_R: torch.Tensor
    """int64: the tokens that reach this MLP, and any that were added because too few do."""
    weights_R: torch.Tensor | None = None
    """float32: what multiplies each token's inputs in the statistics, and its errors; None where all count alike."""

    def of(self, activations: Activations) -> "MlpInputs":
        """Returns the same tokens of another model."""
        return replace(self, activations=activations)

    def weighted(self, weights_R: torch.Tensor) -> "MlpInputs":
        """Returns the same tokens, each multiplied by its own of the weights of all."""
        own_R = weights_R[self.rows_R]
        return replace(self, weights_R=own_R if self.weights_R is None else own_R * self.weights_R)

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields rows and their weights, at most 4096 at once."""
        for start in range(0, len(self.rows_R), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            yield self.rows_R[part], None if self.weights_R is None else self.weights_R[part]

    @property
    def rows_of_few(self) -> torch.Tensor:
        """`CHECK_ROWS` tokens or fewer, evenly spaced, int64."""
        return self.rows_R[:: self._step]

    def few(self) -> torch.Tensor:
        """Returns what is read at a few tokens, float32 [R, H]."""
        return self.activations.rows(self.rows_of_few)

    def energy_of_few(self, outputs_RH: torch.Tensor) -> torch.Tensor:
        """Returns the summed squares of outputs, or of their errors, at the tokens of `few`, float64 []."""
        if self.weights_R is not None:
            outputs_RH = outputs_RH * self.weights_R[:: self._step].unsqueeze(1)
        return outputs_RH.square().double().sum()

    @property
    def _step(self) -> int:
        return max(1, -(-len(self.rows_R) // CHECK_ROWS))

    def moments(self, seed: int) -> InputMoments:
        """Returns the second moments of all of them."""
        statistics = InputStatistics(self.activations.shape[2], seed, self.activations.device)
        with fast_matmuls(self.activations.device):
            for rows_R, weights_R in self.parts():
                statistics.add(self.activations.rows(rows_R), weights_R)
        return statistics.moments()


def top_up(layer: DecoderLayer, weights: Weights, mlp_inputs: Activations, routing: Routing) -> dict[int, torch.Tensor]:
    """Finds for each rare expert the tokens to add: those of other experts whose router scores for it are highest.

    Returns expert -> int64 rows of `mlp_inputs`; with its own tokens they are `FEWEST_TOKENS`, or all there are.
    """
    assert layer.router is not None
    counts = routing.counts(len(layer.experts))
    wanted = min(FEWEST_TOKENS, mlp_inputs.num_rows)
    rare = [expert for expert, count in enumerate(counts.tolist()) if count < wanted]
    if not rare:
        return {}
    router_EH = weights[layer.router][rare]
    parts = torch.arange(mlp_inputs.num_rows, device=weights.device).split(ROWS_AT_ONCE)
    scores_RE = torch.cat([apply_linear(mlp_inputs.rows(part_R), router_EH) for part_R in parts])
    added = {}
    for place, expert in enumerate(rare):
        own_R, _ = routing.tokens_of(expert)
        scores_RE[own_R, place] = -torch.inf
        added[expert] = scores_RE[:, place].topk(wanted - len(own_R)).indices.sort().values
    return added


def read_by_mlps(
    job: LayerJob, mlp_inputs: Activations, routing: Routing | None, weights_R: torch.Tensor
) -> tuple[dict[Mlp, MlpInputs], dict[int, torch.Tensor]]:
    """Returns MLP -> the tokens it is judged on; and rare expert -> those added to its own by the step `top-up`.

    `weights_R` are those of all tokens, from `token_weights`; without any step they count alike.
    """
    added = {}
    if routing and "top-up" in job.steps and job.anywhere(job.layer.experts[0].up):
        added = top_up(job.layer, job.weights, mlp_inputs, routing)
    found = {mlp: inputs_of(mlp_inputs, mlp, routing, added, job.steps) for mlp in job.layer.mlps}
    return {mlp: one.weighted(weights_R) if job.steps else one for mlp, one in found.items()}, added


def mean_squares(hidden_NTH: torch.Tensor) -> torch.Tensor:
    """Returns the mean square of each token's hidden state, float32 [R]."""
    return hidden_NTH.flatten(0, 1).float().square().mean(1)


def token_weights(squares: Sequence[torch.Tensor], ranks: Ranks, device: torch.device) -> torch.Tensor:
    """Returns what multiplies each token's inputs of MLPs in the statistics, float32 [R]; the mean of its squares is 1.

    With `follow` it multiplies those of attention's output too.

    It is the root of 1 / rms(hidden state); `squares` are the `mean_squares` of what this rank's batches put out,
    without experts. The next norm divides by the rms, so an error counts less where it is added to much. A few tokens
    of pretrained models have hidden states thousands of times as large as others' ("massive activations", arXiv
    2402.17762) and would decide alone; but others attend to them, and to divide by the whole rms neglects them
    (docs/decisions/0042).
    """
    own_R = torch.cat([torch.empty(0, device=device), *squares])
    if ranks.size > 1:
        own_R = torch.cat(ranks.gather(own_R.cpu())).to(device)
    weights_R = own_R.clamp(min=LEAST_SQUARE) ** -0.25
    return weights_R / weights_R.square().mean().sqrt()


def inputs_of(
    mlp_inputs: Activations,
    mlp: Mlp,
    routing: Routing | None,
    added: Mapping[int, torch.Tensor],
    steps: Collection[Step],
) -> MlpInputs:
    """Returns the tokens that one MLP is judged on: all; or an expert's own and those `added` for it.

    An expert's are weighted by its share in each where `gate-weights` is a step. Added ones, in which it has no share,
    get its least one; 1 where it has no token at all.
    """
    if mlp.expert is None:
        return MlpInputs(mlp_inputs, torch.arange(mlp_inputs.num_rows, device=mlp_inputs.device))
    assert routing is not None
    own_R, share_R = routing.tokens_of(mlp.expert)
    added_R = added.get(mlp.expert, own_R[:0])
    rows_R = torch.cat([own_R, added_R])
    if "gate-weights" not in steps:
        return MlpInputs(mlp_inputs, rows_R)
    least = share_R.min() if len(share_R) else share_R.new_ones(())
    return MlpInputs(mlp_inputs, rows_R, torch.cat([share_R, least.expand(len(added_R))]))
