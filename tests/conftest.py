"""What several test modules share."""

import gc
import os
import signal
from pathlib import Path

# The tests' matrices are small: several threads, or several runs on one machine, would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has what it starts in the background ignore SIGINT, and so would every process that tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

# Where there is no GPU, Triton's kernels run in its interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from checkpoints import add_tokenizer, make_pico_r1
from shapes import NARROW, SMALLEST


def pytest_collection_finish() -> None:
    """Takes modules and tests out of the collector's sight, which else looks through them for a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
def nano_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a dense layer and a mixture of four experts, for jobs whose test the size proves nothing."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("smallest") / "pico-r1", **SMALLEST))


@pytest.fixture(scope="session")
def narrow_r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same half as wide, for jobs that search."""
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("narrow") / "pico-r1", **NARROW))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    shipped = sorted((TINY_R1.parents[2] / "calibration" / "code").glob("*.py"))
    path.write_text("\n".join(file.read_text() for file in shipped[:2]))
    return path


@pytest.fixture(scope="session")
def imported(nano_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a job imports is imported: forked processes (`forked`) have it, and need not do so one by one."""
    import torch.distributed.tensor  # noqa: F401

    import dsquant

    dsquant.awq(
        nano_r1, output=tmp_path_factory.mktemp("imports") / "out", to=["awq", "compressed-tensors"], steps="none",
        calibration=text_file, samples=1, seq_len=16, group_size=64, evaluate=False, progress=False,
    )  # fmt: skip
