"""Runs a layer's routed experts in every lane, and compares their weights; each rank has one expert at a time.

Shape legend: H hidden size, R tokens, W width of an expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dsquant.evaluation.lanes import Lane
from dsquant.evaluation.reading import Reading, SideStream
from dsquant.evaluation.results import WeightError
from dsquant.evaluation.weight_errors import ErrorSums, LayerComparison, Moments
from dsquant.jobs.ranks import Ranks, Shares
from dsquant.model.gated import GatedWeights
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import DecoderLayer, Mlp

# What a rank's experts put out in all lanes waits for the exchange between ranks, up to about this many bytes of it.
WAITING_BYTES = 2**29
# At most this many experts of a rank wait.
WAITING_EXPERTS = 8
# The lane of the original's second run.
NOISE = 1

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Gets what gate and up read, [R, H], and what down reads, [R, W]."""


@dataclass(frozen=True)
class RoutedExperts:
    """A layer's experts, and all that they pass through."""

    skeleton: Skeleton
    layer: DecoderLayer
    lanes: Sequence[Lane]
    """Two of each model: the original's and its second run's, then each candidate's own and local one."""
    comparisons: Sequence[LayerComparison]
    """Of the candidates."""
    noise_rows: int
    """Tokens that pass an expert together in the original's second run."""
    ranks: Ranks
    shares: Shares
    """Of tokens."""
    reading: Reading
    side_stream: SideStream
    safe_point: Callable[[str], None]

    def run(self) -> list[list[WeightError]]:
        """Adds what experts put out to every lane; returns the errors of their weights by candidate, on every rank."""
        experts, ranks = self.layer.experts, self.ranks
        own: list[list[list[ErrorSums]]] = []
        shared = self.lanes if ranks.size > 1 else ()
        counts = [tokens_by_rank(lane.routing, len(experts), self.shares) for lane in shared]
        outputs, together = _Outputs(self.lanes, ranks, counts), ranks.size * self._experts_together()
        for begin in range(0, len(experts), together):
            some = experts[begin : begin + together]
            for mlp in some[ranks.rank :: ranks.size]:
                self.safe_point(mlp.gate.rpartition(".")[0])
                own.append(self._run(mlp, outputs))
                self.side_stream.queued()
            outputs.exchange([mlp.expert for mlp in some if mlp.expert is not None])
        errors = [[[one.error() for one in sums] for sums in of_expert] for of_expert in own]
        found = ranks.in_turns(errors, len(experts))
        places = range(len(self.comparisons))
        return [[error for of_expert in found for error in of_expert[place]] for place in places]

    def _experts_together(self) -> int:
        """How many experts of a rank wait, the same on all."""
        inputs, routing = self.lanes[0].mlp_inputs, self.lanes[0].routing
        assert routing is not None
        tokens = inputs.num_rows * routing.expert_RK.shape[1] // len(self.layer.experts) + 1
        return max(1, min(WAITING_EXPERTS, WAITING_BYTES // (4 * tokens * inputs.shape[2] * len(self.lanes))))

    def _run(self, mlp: Mlp, outputs: "_Outputs") -> list[list[ErrorSums]]:
        """Runs an expert in all lanes, each model's weights read once; returns what tells its errors by candidate."""
        inputs, hidden = Moments(), Moments()

        def observe(inputs_RH: torch.Tensor, hidden_RW: torch.Tensor) -> None:
            inputs.add(inputs_RH)
            hidden.add(hidden_RW)

        original = self._pass(mlp, 0, outputs, observe)
        moments = {mlp.gate: inputs, mlp.up: inputs, mlp.down: hidden}
        sums = [
            comparison.of_mlp(mlp, original, self._pass(mlp, model, outputs), moments)
            for model, comparison in enumerate(self.comparisons, start=1)
        ]
        self.reading.used()
        return sums

    def _pass(self, mlp: Mlp, model: int, outputs: "_Outputs", observe: Observer | None = None) -> GatedWeights:
        """Reads an expert of one model and runs it in that model's two lanes; returns its weights. `observe` gets what
        gate and down read in the first."""
        assert mlp.expert is not None
        weights = self.side_stream.read(self.lanes[2 * model].weights, mlp)
        for place in (2 * model, 2 * model + 1):
            lane = self.lanes[place]
            assert lane.routing is not None
            rows_R, share_R = lane.routing.tokens_of(mlp.expert)
            at_once = self.noise_rows if place == NOISE else ROWS_AT_ONCE
            for start in range(0, len(rows_R), at_once):
                part = slice(start, start + at_once)
                inputs_RH = lane.mlp_inputs.rows(rows_R[part])
                hidden_RW = weights.hidden(self.skeleton, inputs_RH)
                if observe is not None and place == 2 * model:
                    observe(inputs_RH, hidden_RW)
                added_RH = weights.output_of(hidden_RW).mul_(share_R[part].unsqueeze(1))
                outputs.add(place, mlp.expert, rows_R[part], added_RH)
        return weights


@dataclass
class _Outputs:
    """What a rank's experts put out, until it is added to the tokens that it is for, of all ranks."""

    lanes: Sequence[Lane]
    ranks: Ranks
    counts: Sequence[list[list[int]]]
    """Of each lane, by expert and rank: the expert's tokens in the rank's share. Empty for one rank."""
    waiting: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    """Lane and expert of this rank -> rows, float32 [R, H] each."""

    def add(self, place: int, expert: int, rows_R: torch.Tensor, added_RH: torch.Tensor) -> None:
        """Takes what an expert of this rank puts out for some of its tokens in a lane, in their order."""
        if self.ranks.size == 1:
            self.lanes[place].outputs.add_rows(rows_R, added_RH)
        else:
            self.waiting.setdefault((place, expert), []).append(added_RH)

    def exchange(self, experts: Sequence[int]) -> None:
        """Gives every rank the rows of its tokens, and adds them in the order of experts, which the ranks have had in
        turns."""
        ranks, size = self.ranks, self.ranks.size
        if size == 1:
            return
        mine = [(place, expert) for place in range(len(self.lanes)) for expert in experts[ranks.rank :: size]]
        to_ranks = [self._parts(place, expert) for place, expert in mine]
        sent = [part for of_rank in zip(*to_ranks, strict=True) for part in of_rank]
        to = [sum(self.counts[place][expert][rank] for place, expert in mine) for rank in range(size)]
        sizes = [
            [counts[expert][ranks.rank] for counts in self.counts for expert in experts[rank::size]]
            for rank in range(size)
        ]
        come = [sum(of_rank) for of_rank in sizes]
        found_RH = ranks.deliver(torch.cat([self._none_RH, *sent]), to, come)
        found = [iter(part.split(of_rank)) for part, of_rank in zip(found_RH.split(come), sizes, strict=True)]
        for lane, counts in zip(self.lanes, self.counts, strict=True):
            assert lane.routing is not None
            for number, expert in enumerate(experts):
                rows_R = lane.routing.tokens_of(expert)[0].split(counts[expert])[ranks.rank]
                lane.outputs.add_rows(rows_R, next(found[number % size]))
        self.waiting.clear()

    def _parts(self, place: int, expert: int) -> tuple[torch.Tensor, ...]:
        """What an expert of this rank has put out in a lane, by rank."""
        made = self.waiting.get((place, expert), [])
        return torch.cat([self._none_RH, *made]).split(self.counts[place][expert])

    @property
    def _none_RH(self) -> torch.Tensor:
        outputs = self.lanes[0].outputs
        return torch.empty(0, outputs.shape[2], device=outputs.device)


def tokens_by_rank(routing: Routing | None, num_experts: int, shares: Shares) -> list[list[int]]:
    """Returns how many tokens of each expert are in each rank's share of all tokens."""
    assert routing is not None
    device = routing.expert_RK.device
    ends_S = torch.tensor([shares.samples(rank)[1] for rank in range(shares.size)], device=device)
    rank_R = torch.bucketize(torch.arange(len(routing.expert_RK), device=device), ends_S, right=True)
    pairs_RK = routing.expert_RK.long() * shares.size + rank_R.unsqueeze(1)
    counts = torch.bincount(pairs_RK.flatten(), minlength=num_experts * shares.size)
    found: list[list[int]] = counts.view(num_experts, shares.size).tolist()
    return found
