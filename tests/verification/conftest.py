"""What the tests of verification share."""

from pathlib import Path

import pytest

import dsquant


@pytest.fixture(scope="session")
def output(nano_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small R1 in three formats; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("verify") / "out"
    dsquant.awq(
        nano_r1, output=folder, to=["awq", "compressed-tensors", "gguf:Q4_K_M"], preset="quality",
        steps="none", calibration=text_file, group_size=64, samples=2, seq_len=64, evaluate=False, progress=False,
    )  # fmt: skip
    return folder
