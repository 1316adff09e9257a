"""What several test modules share."""

import os
from pathlib import Path

# The tests' matrices are small: several threads, or several runs on one machine, would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from checkpoints import add_tokenizer, make_pico_r1

TINY_R1 = Path(__file__).parent.parent / "dsquant" / "assets" / "tiny-r1"


@pytest.fixture(scope="session")
def tiny_r1() -> Path:
    """The embedded model."""
    return TINY_R1


@pytest.fixture(scope="session")
def pico_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 5-layer checkpoint in R1's layout with a tokenizer; tests must not change it."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("pico") / "pico-r1"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))[:6]))
    return path
