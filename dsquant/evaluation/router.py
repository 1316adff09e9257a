"""Compares a candidate's routing with the original's.

Shape legend: R tokens, K experts of a token, E experts of a layer.
"""

import torch

from dsquant.model.streaming import Routing


def overlap(original: Routing, candidate: Routing) -> torch.Tensor:
    """Returns the share of the original's experts that the candidate chooses too, by token: float64 [R], 0 to 1."""
    same_RKK = original.expert_RK.unsqueeze(2) == candidate.expert_RK.unsqueeze(1)
    return same_RKK.any(2).double().mean(1)


def weight_distance(original: Routing, candidate: Routing, num_experts: int) -> float:
    """Returns the mean L1 distance of the experts' weights in the mixture, as a share of the original's sum of weights.

    0 where the mixtures are the same, 2 where they share no expert.
    """
    rows = len(original.expert_RK)
    mixtures = [
        torch.zeros(rows, num_experts, device=one.share_RK.device).scatter_(1, one.expert_RK.long(), one.share_RK)
        for one in (original, candidate)
    ]
    distance_R = (mixtures[0] - mixtures[1]).abs().sum(1)
    return float((distance_R / mixtures[0].sum(1)).double().mean())


def load_shift(original: Routing, candidate: Routing, num_experts: int) -> float:
    """Returns the share of routed tokens by which the experts' loads differ (total variation distance), 0 to 1."""
    loads = [one.counts(num_experts).double() / one.expert_RK.numel() for one in (original, candidate)]
    return float((loads[0] - loads[1]).abs().sum() / 2)
