"""What the tests of formats share."""

from pathlib import Path

import pytest
from checkpoints import QWEN3
from gguf_models import ATTN_FACTOR, YARN, f32, make


@pytest.fixture(scope="session")
def like_r1_0528(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Qwen3 with R1-0528-Qwen3-8B's scaling, and its GGUF file."""
    folder = tmp_path_factory.mktemp("r1-0528")
    model = make(folder / "model", QWEN3 | {"rope_scaling": YARN | {"attn_factor": ATTN_FACTOR}})
    return model, f32(model, folder / "out")
