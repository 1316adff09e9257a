"""Scores tokens with ik_llama.cpp on a CPU (`scoring.py` tells how it is called), by the C functions of its package."""

from pathlib import Path

import numpy as np
from ik_llama_cpp import _ctypes_api as ik

from benchmarks.engines.scoring import Scores, score_all

MLA_OF_DEEPSEEK = 3
"""What its own server takes: keys and values stay latent."""


def score(model: Path, tokens: list[list[int]]) -> Scores:
    """Its defaults without flash attention, which its package also turns off on processors without VNNI."""
    ik.llama_backend_init()
    loaded = ik.llama_model_load_from_file(str(model).encode(), ik.llama_model_default_params())
    if not loaded:
        raise ValueError("llama_model_load_from_file: it does not load")
    asked = ik.llama_context_default_params()
    asked.n_ctx = asked.n_batch = 512
    asked.n_threads = asked.n_threads_batch = 1
    asked.flash_attn, asked.mla_attn = False, MLA_OF_DEEPSEEK
    context = ik.llama_init_from_model(loaded, asked)
    if not context:
        raise ValueError("llama_init_from_model: no context")
    vocabulary = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(loaded))
    found = [_of_sample(context, sample, vocabulary) for sample in tokens]
    ik.llama_free(context)
    ik.llama_free_model(loaded)
    return found


def _of_sample(context: int, sample: list[int], vocabulary: int) -> list[float]:
    ik.llama_kv_cache_clear(context)
    batch = ik.llama_batch_init(len(sample), 0, 1)
    batch.n_tokens = len(sample)
    for place, token in enumerate(sample):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if ik.llama_decode(context, batch):
        raise ValueError("llama_decode failed")
    rows = [
        np.ctypeslib.as_array(ik.llama_get_logits_ith(context, place), (vocabulary,)).astype(np.float64)
        for place in range(len(sample) - 1)
    ]
    logits_TV = np.stack(rows)
    logits_TV -= logits_TV.max(1, keepdims=True)
    logs_T = logits_TV[np.arange(len(rows)), sample[1:]] - np.log(np.exp(logits_TV).sum(1))
    ik.llama_batch_free(batch)
    return logs_T.tolist()


if __name__ == "__main__":
    score_all(score)
