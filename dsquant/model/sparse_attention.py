"""Chooses the keys that queries of sparse attention see: transformers' indexers, in blocks of queries.

Where no more tokens are there than a query sees, nothing is computed. transformers' own forward holds the scores of all
heads for all pairs of tokens, 1 GiB for 2,048 tokens of DeepSeek-V3.2; it still runs where earlier tokens are cached,
in generation.

Shape legend: N samples, T tokens, K chosen keys, B queries of a block, J heads of the indexer, D their dimension, H
hidden size, Q width of the queries' latent.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

QUERIES_AT_ONCE = 64


def replace_indexers(model: nn.Module, rotates_neighbours: bool) -> None:
    """Lets `chosen_keys` stand for the forward of every indexer of a model, in place."""
    for name, module in model.named_modules():
        if name.endswith(".indexer"):
            module.forward = partial(chosen_keys, module, module.forward, rotates_neighbours)


def chosen_keys(
    indexer: Any,
    with_cache: Callable[..., torch.Tensor],
    rotates_neighbours: bool,
    hidden_NTH: torch.Tensor,
    latent_NTQ: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
    *others: Any,
    **cached: Any,
) -> torch.Tensor:
    """Returns the keys that each query sees, int32 [N, T, K]; of no elements where it sees all up to itself.

    `others` and `cached`, earlier tokens by the name that the release of transformers gives them, are for
    transformers' own forward, `with_cache`, which runs where there are earlier tokens.
    """
    if any(value is not None for value in cached.values()):
        return with_cache(hidden_NTH, latent_NTQ, positions, *others, **cached)
    tokens = hidden_NTH.shape[1]
    if tokens <= indexer.index_topk:
        return hidden_NTH.new_empty(0, dtype=torch.int32)
    with torch.no_grad():
        rotated = partial(_rotated, positions=positions, neighbours=rotates_neighbours)
        queries_NTJD = rotated(indexer.wq_b(latent_NTQ).unflatten(-1, (indexer.n_heads, -1)))
        keys_NTD = rotated(indexer.k_norm(indexer.wk(hidden_NTH)).unsqueeze(2)).squeeze(2)
        shares_NTJ = indexer.weights_proj(hidden_NTH) * (indexer.n_heads**-0.5 * indexer.softmax_scale)
        later_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_NTH.device).triu_(1)
        found = []
        for start in range(0, tokens, QUERIES_AT_ONCE):
            block = slice(start, start + QUERIES_AT_ONCE)
            scores_NBJT = torch.einsum("nbjd,ntd->nbjt", queries_NTJD[:, block], keys_NTD).relu_()
            score_NBT = torch.einsum("nbj,nbjt->nbt", shares_NTJ[:, block], scores_NBJT)
            score_NBT = score_NBT.masked_fill(later_TT[block], -torch.inf)
            found.append(score_NBT.topk(indexer.index_topk, dim=-1).indices.to(torch.int32))
    return torch.cat(found, 1)


def _rotated(heads_NTJD: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], neighbours: bool) -> torch.Tensor:
    """Rotates the first dimensions of heads, pairs of neighbours or of the two halves."""
    cosines, sines = (part.unsqueeze(2) for part in positions)
    width = cosines.shape[-1]
    turned, plain = heads_NTJD[..., :width], heads_NTJD[..., width:]
    if neighbours:
        turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cosines + torch.cat([-second, first], -1) * sines, plain], -1)


def seen_keys(indices_NTK: torch.Tensor | None, mask: torch.Tensor | None, num_keys: int) -> torch.Tensor | None:
    """Returns what sparse attention sees as a mask, bool [N, 1, T, keys], True where seen; None for all keys up to the
    query.

    `indices_NTK` are `chosen_keys`; `mask` may be transformers' causal one, or of one element where there is none.
    """
    whole = mask if mask is not None and mask.shape[-1] == num_keys and mask.numel() > 1 else None
    if indices_NTK is None or not indices_NTK.numel():
        return whole
    samples, tokens, _ = indices_NTK.shape
    seen = torch.zeros(samples, tokens, num_keys, dtype=torch.bool, device=indices_NTK.device)
    seen.scatter_(-1, indices_NTK.long(), True)
    if whole is None:
        return seen.tril_().unsqueeze(1)
    return seen.unsqueeze(1) & whole
