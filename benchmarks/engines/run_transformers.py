"""Scores tokens with transformers in bfloat16 (`scoring.py` tells how it is called). Runs in its environment."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.engines.scoring import Scores, score_all


@torch.no_grad()
def score(model: Path, tokens: list[list[int]]) -> Scores:
    """Loads with `from_pretrained`; a weight that it did not find in the files, and made up, is an error."""
    network, told = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, output_loading_info=True)
    if told["missing_keys"]:
        raise ValueError(f"{len(told['missing_keys'])} weights missing, such as {min(told['missing_keys'])}")
    network.eval()
    found = []
    for sample in tokens:
        logits_TV = network(torch.tensor([sample])).logits[0, :-1].float().log_softmax(-1)
        found.append(logits_TV.gather(1, torch.tensor(sample[1:]).unsqueeze(1)).squeeze(1).tolist())
    return found


if __name__ == "__main__":
    score_all(score)
