"""Exchanges a layer's statistics and outputs between ranks, so that bytes do not depend on the number of ranks.

Sums over samples are formed chunk by chunk and added in the order of chunks; sums over a token's experts are formed
where the token is, in the order of experts (docs/decisions/0013).

Shape legend: N samples, T tokens of a sample, H hidden size, I in features, R tokens of all samples, K experts of a
token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from dsquant.jobs.ranks import CHUNKS, Ranks, Shares
from dsquant.kernels.precision import fast_matmuls
from dsquant.model.activations import Activations
from dsquant.model.streaming import Routing
from dsquant.quantization.layer_job import LayerJob
from dsquant.quantization.statistics import WIDEST_PART, InputMoments, InputStatistics

# Between the seeds of chunks, so that no two combine their tokens with the same signs.
SEED_STEP = 7919


class SampleStatistics:
    """The statistics of a linear's inputs over all samples of all ranks."""

    def __init__(self, job: LayerJob, num_features: int, compensated: bool = False) -> None:
        """Starts with this rank's first chunk.

        Inputs wider than `WIDEST_PART` are not compensated, since every chunk's Gram matrices would have to travel.
        """
        self._ranks, self._shares, self._device = job.ranks, job.shares, job.weights.device
        self._features, self._seed = num_features, job.seed
        self._compensated = compensated and num_features <= WIDEST_PART
        self._number = sum(len(self._shares.chunks(rank)) for rank in range(self._ranks.rank))
        self._total = self._empty(CHUNKS)
        self._chunk = self._empty(self._number)
        self._kept: list[InputStatistics] = []

    def _empty(self, chunk: int) -> InputStatistics:
        seed = self._seed + SEED_STEP * chunk
        return InputStatistics(self._features, seed, self._device, compensated=self._compensated)

    def add(self, inputs_RI: torch.Tensor) -> None:
        """Takes more tokens of the chunk into the sums, float32 [R, I]."""
        self._chunk.add(inputs_RI)

    def end_chunk(self) -> None:
        """Ends the chunk; later tokens belong to the next one."""
        if self._ranks.first:  # the order begins with its chunks
            self._merge(self._chunk)
        else:
            self._kept.append(self._chunk)
        self._number += 1
        self._chunk = self._empty(self._number)

    def moments(self, num_tokens: int, everywhere: bool = False) -> InputMoments:
        """Returns the means over the tokens of all ranks on rank 0, or `everywhere`; elsewhere empty ones."""
        for rank in range(1, self._ranks.size):
            for start, stop in self._shares.chunks(rank):
                if self._ranks.rank in (0, rank):
                    part = self._kept.pop(0) if self._ranks.rank == rank else self._empty(CHUNKS)
                    part.travel((stop - start) * num_tokens, partial(self._ranks.hand_to_first, source=rank))
                    if self._ranks.first:
                        self._merge(part)
        if everywhere:
            self._total.travel(self._shares.num_samples * num_tokens, self._ranks.broadcast)
        return self._total.moments()

    def _merge(self, part: InputStatistics) -> None:
        with fast_matmuls(self._device):
            self._total.merge(part)


def share_rows(activations: Activations, ranks: Ranks, shares: Shares) -> None:
    """Gives every rank all samples, of which each has computed its share, in a common file or in memory."""
    if activations.in_a_file:
        ranks.barrier()
        return
    for rank in range(ranks.size):
        ranks.broadcast(activations.stored(*shares.samples(rank)), rank)


def differences(job: LayerJob, others: Activations) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function of rows, int64 [R], that gives the layer's outputs less `others`, float32 [R, H]: on rank 0
    those of all ranks' samples, as they are now or, in one process or a common file, when it is called."""
    ranks, outputs = job.ranks, job.outputs
    if ranks.size == 1 or outputs.in_a_file:
        ranks.barrier()
        return lambda rows_R: outputs.rows(rows_R) - others.rows(rows_R)
    whole = Activations(
        torch.empty(job.inputs.shape if ranks.first else (0, *job.inputs.shape[1:]), device=outputs.device)
    )
    for rank in range(ranks.size):
        first, end = job.shares.samples(rank)
        for start in range(first, end, job.batch_samples):
            batch = start, min(start + job.batch_samples, end)
            if ranks.rank == rank:
                part_NTH = outputs.samples(*batch) - others.samples(*batch)
            elif ranks.first:
                part_NTH = torch.empty(batch[1] - batch[0], *job.inputs.shape[1:], device=outputs.device)
            else:
                continue
            ranks.hand_to_first(part_NTH, rank)
            if ranks.first:
                whole.set_samples(start, part_NTH)
    return whole.rows


def share_routing(routing: Routing | None, ranks: Ranks, device: torch.device) -> Routing | None:
    """Returns the routing of all samples' tokens on every rank, from each rank's; None where there are no experts."""
    if ranks.size == 1:
        return routing
    found = ranks.gather(None if routing is None else (routing.expert_RK.cpu(), routing.share_RK.cpu()))
    parts = [part for part in found if part is not None]
    if not parts:
        return None
    return Routing(*(torch.cat(columns).to(device) for columns in zip(*parts, strict=True)))


def exchange_rows(
    ranks: Ranks, shares: Shares, outputs: Activations, tokens: Sequence[torch.Tensor], own_RH: torch.Tensor
) -> None:
    """Adds rows that each rank has made for tokens of all ranks to this rank's samples of `outputs`, in the order of
    ranks.

    Rank r has made those of `tokens[r]`, int64 in ascending order; `own_RH` are this rank's, [R, H].
    """
    edges = [shares.samples(rank)[0] for rank in range(ranks.size)] + [shares.num_samples]
    edges_S = torch.tensor(edges, device=own_RH.device) * outputs.shape[1]
    cuts = [torch.searchsorted(rows_R, edges_S).tolist() for rows_R in tokens]
    to = [stop - start for start, stop in pairwise(cuts[ranks.rank])]
    come = [cut[ranks.rank + 1] - cut[ranks.rank] for cut in cuts]
    found = ranks.deliver(own_RH, to, come).split(come)
    for rows_R, cut, added_RH in zip(tokens, cuts, found, strict=True):
        outputs.add_rows(rows_R[cut[ranks.rank] : cut[ranks.rank + 1]], added_RH)


def in_the_order_of_batches(
    job: LayerJob, observe: Callable[[tuple[int, int]], Sequence[torch.Tensor]], widths: Sequence[int]
) -> Iterator[Sequence[torch.Tensor]]:
    """Yields on rank 0, and on no other, what linears read in each batch of samples, in the order of batches.

    Ranks take the batches in turns; all have to consume this. `observe` gets the first sample of a batch and the one
    behind its last, and returns inputs [R, I] of these widths. Added one after the other they give one rank's sums.
    """
    ranks, (num_samples, num_tokens, _) = job.ranks, job.inputs.shape
    starts = range(0, num_samples, job.batch_samples)
    batches = [(start, min(start + job.batch_samples, num_samples)) for start in starts]
    for begin in range(0, len(batches), ranks.size):
        turn = batches[begin : begin + ranks.size]
        own = observe(turn[ranks.rank]) if ranks.rank < len(turn) else ()
        if ranks.first:
            yield own
        for rank, (start, stop) in list(enumerate(turn))[1:]:
            if ranks.rank == rank:
                found = [part_RI.contiguous() for part_RI in own]
            elif ranks.first:
                rows = (stop - start) * num_tokens
                found = [torch.empty(rows, width, device=job.weights.device) for width in widths]
            else:
                continue
            for part_RI in found:
                ranks.hand_to_first(part_RI, rank)
            if ranks.first:
                yield found
