"""Compares what mlx-lm computes from an output of `--to mlx` with the same weights as dsquant reads them.

    pip install "mlx[cpu]" mlx-lm
    dsquant awq MODEL --to mlx --group-size 64 --output DIR
    python -m benchmarks.mlx_lm_logits DIR

Both in float32 on a CPU, on random tokens: what is left is the order of sums. Engines run such outputs in bfloat16.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_map
from mlx_lm.utils import load_model

from dsquant.formats.checkpoints import open_checkpoint
from tests.support.checkpoints import full_model

SAMPLES, TOKENS = 2, 48


def mlx_logits(folder: Path, tokens_NT: torch.Tensor) -> torch.Tensor:
    """Loads an output with mlx-lm and returns float32 [N, T, V]."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    single = tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    model.update(single)
    return torch.from_numpy(np.array(model(mx.array(tokens_NT.numpy())).astype(mx.float32)))


def main() -> None:
    """Prints the divergence."""
    folder = Path(sys.argv[1])
    checkpoint = open_checkpoint(folder)
    rows = checkpoint.weights.shape("model.embed_tokens.weight")[0]
    tokens_NT = torch.randint(rows, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = full_model(folder, checkpoint.weights)(tokens_NT).logits.float()
    found = mlx_logits(folder, tokens_NT)
    logs, wanted_logs = found.log_softmax(-1), wanted.log_softmax(-1)
    divergence = (wanted_logs.exp() * (wanted_logs - logs)).sum(-1).mean()
    print(f"mean KL {divergence:.1e} nats, largest difference of logits {(found - wanted).abs().max():.1e}")


if __name__ == "__main__":
    main()
