"""Models on their way through the network together: their hidden states, and what a layer of one did differently.

Shape legend: N samples, T tokens of a sample, H hidden size, R tokens of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from dsquant.evaluation import router
from dsquant.evaluation.measures import Distance, LayerMeasures, relative_of
from dsquant.evaluation.results import WeightError
from dsquant.jobs.ranks import Ranks
from dsquant.model.activations import Activations
from dsquant.model.streaming import Routing
from dsquant.source.weights import Weights


@dataclass
class Lane:
    """Weights and the hidden states [N, T, H] that pass through a layer of them."""

    weights: Weights
    batch_samples: int
    inputs: Activations
    outputs: Activations
    middle: Activations
    """Hidden states between attention and MLP."""
    mlp_inputs: Activations
    routing: Routing | None = None


@dataclass
class Runner:
    """A model that runs beside the original."""

    own: Lane
    """On the model's own hidden states."""
    local: Lane | None
    """Each layer on the original's hidden states: the error of this layer alone; None for the noise floor."""
    final: Activations
    """Normed: of every token after the last layer, then of the lens's tokens after each layer."""
    layers: list[LayerMeasures] = field(default_factory=list)
    errors: list[WeightError] = field(default_factory=list)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Its own, and the local one."""
        return (self.own,) if self.local is None else (self.own, self.local)


def layer_measures(
    original: Lane, runner: Runner, num_experts: int, samples: Sequence[int], ranks: Ranks
) -> LayerMeasures:
    """Compares a model with the original in a layer that both have passed; `samples` are this rank's, in order."""
    errors = _hidden_errors(original, runner, samples, ranks)
    routing, own = original.routing, runner.own.routing
    if routing is None or own is None:
        return LayerMeasures(*errors)
    local_overlap = None
    if runner.local is not None and runner.local.routing is not None:
        local_overlap = float(router.overlap(routing, runner.local.routing).mean())
    return LayerMeasures(
        *errors,
        overlap_NT=router.overlap(routing, own).view(original.inputs.shape[:2]).cpu(),
        local_overlap=local_overlap,
        weight_distance=router.weight_distance(routing, own, num_experts),
        load_shift=router.load_shift(routing, own, num_experts),
    )


def _hidden_errors(
    original: Lane, runner: Runner, samples: Sequence[int], ranks: Ranks
) -> tuple[float, float, float, float]:
    """The relative errors behind the layer, and of the updates of the whole layer, attention and MLP."""
    hidden, whole, attention, mlp = (Distance() for _ in range(4))
    for sample in samples:
        at = (sample, sample + 1)
        before, middle, after = (part.samples(*at) for part in (original.inputs, original.middle, original.outputs))
        hidden.add(after, runner.own.outputs.samples(*at))
        if runner.local is not None:
            local_middle, local_after = runner.local.middle.samples(*at), runner.local.outputs.samples(*at)
            whole.add(after - before, local_after - before)
            attention.add(middle - before, local_middle - before)
            mlp.add(after - middle, local_after - local_middle)
    of_ranks = ranks.gather([distance.terms for distance in (hidden, whole, attention, mlp)])
    found = [relative_of(chain(*terms)) for terms in zip(*of_ranks, strict=True)]
    return found[0], found[1], found[2], found[3]
