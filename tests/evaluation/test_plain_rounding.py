"""`dsquant eval --plain-rounding`: the original on a candidate's grids, without any search."""

from pathlib import Path

import torch
from small_jobs import FAST

import dsquant
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.evaluation.plain_rounding import PlainWeights, with_plain_rounding
from dsquant.schemes import Grid


def test_the_yardstick_is_what_a_job_without_steps_stores(nano_r1: Path, tmp_path: Path) -> None:
    formats = ["awq", "compressed-tensors", "mlx", "gguf:Q4_0", "gguf:BF16"]
    dsquant.awq(nano_r1, output=tmp_path / "out", to=formats, symmetric=True, mtp="drop", **FAST)
    original = open_original(str(nano_r1))
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    opened = {name: open_candidate(str(tmp_path / "out" / name), original) for name in folders}
    for name in ("awq", "compressed-tensors", "mlx"):
        plain = PlainWeights(original.checkpoint.weights, opened[name].weights)
        assert len(plain.schemes) > 10 and all(isinstance(grid, Grid) for grid in plain.schemes.values())
        for linear in list(plain.schemes)[:6]:
            wanted = opened[name].weights[linear]
            assert torch.allclose(plain[linear], wanted, atol=1e-3 * float(wanted.abs().max())), (name, linear)
    models, plain_of = with_plain_rounding(original.checkpoint.weights, opened)
    assert plain_of == {"awq, plain": "awq", "gguf-Q4_0, plain": "gguf-Q4_0"}  # the others have awq's grids, or none
    assert list(models)[:2] == ["awq", "awq, plain"]
    assert models["awq, plain"].bits_per_weight == models["awq"].bits_per_weight
