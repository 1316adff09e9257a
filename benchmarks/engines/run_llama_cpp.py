"""Scores tokens with llama.cpp on a CPU (`scoring.py` tells how it is called). Runs in dsquant's environment."""

from pathlib import Path

import torch

from benchmarks.engines.scoring import Scores, score_all
from tests.support.llama_cpp import every_position


def score(model: Path, tokens: list[list[int]]) -> Scores:
    """llama.cpp's defaults, one thread."""
    tokens_NT = torch.tensor(tokens)
    logs_NTV = every_position(model, tokens_NT)[:, :-1]
    return logs_NTV.gather(2, tokens_NT[:, 1:, None]).squeeze(2).tolist()


if __name__ == "__main__":
    score_all(score)
