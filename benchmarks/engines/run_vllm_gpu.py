"""Scores tokens with vLLM on a GPU, by its own kernels (`scoring.py` tells how that is called).

Runs in the environment of vLLM.
"""

from pathlib import Path

from benchmarks.engines.scoring import Scores, score_all
from benchmarks.engines.vllm_scores import score

CACHE_BYTES = 2**30


def score_on_gpu(model: Path, tokens: list[list[int]]) -> Scores:
    """As `score`, with a small cache: several models share the card."""
    return score(model, tokens, gpu_memory_utilization=0.1, kv_cache_memory_bytes=CACHE_BYTES)


if __name__ == "__main__":
    score_all(score_on_gpu)
