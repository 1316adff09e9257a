"""The keys that an indexer chooses, beside transformers' own forward of it."""

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from random_models import random_module

from dsquant.model.sparse_attention import chosen_keys, seen_keys

TOKENS = 24


@pytest.fixture(scope="module")
def indexer() -> Any:
    """A layer's, of 16 keys for a query."""
    config = ARCHITECTURES["DeepSeek-V3.2"].config
    small = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "index_topk": 16, "index_n_heads": 32}
    return random_module(config | small).model.layers[0].self_attn.indexer


def inputs(indexer: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states, the queries' latent, cosines and sines."""
    generator = torch.Generator().manual_seed(0)
    hidden_NTH = torch.randn(2, TOKENS, indexer.hidden_size, generator=generator)
    angles_TF = torch.rand(TOKENS, indexer.qk_rope_head_dim // 2, generator=generator).repeat(1, 2)
    latent_NTQ = torch.randn(2, TOKENS, indexer.q_lora_rank, generator=generator)
    return hidden_NTH, latent_NTQ, (angles_TF.cos()[None], angles_TF.sin()[None])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_keys_are_those_of_transformers_whatever_it_calls_its_cache(indexer: Any, name: str) -> None:
    causal = torch.full((TOKENS, TOKENS), -torch.inf).triu_(1)[None]
    found = chosen_keys(indexer, _never, False, *inputs(indexer), causal, None, **{name: None})
    wanted = indexer(*inputs(indexer), causal, None)
    assert torch.equal(seen_keys(found, None, TOKENS), seen_keys(wanted, None, TOKENS))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_earlier_tokens_are_left_to_transformers(indexer: Any, name: str) -> None:
    calls: list[Any] = []

    def own_forward(*arguments: Any, **cached: Any) -> torch.Tensor:
        calls.append((len(arguments), cached))
        return torch.zeros(0)

    cache = object()
    chosen_keys(indexer, own_forward, False, *inputs(indexer), "mask", "positions", **{name: cache})
    assert calls == [(5, {name: cache})]


def _never(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("transformers' own forward ran")
