"""Bytes that do not depend on the number of threads."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dsquant
from dsquant.jobs.folder_state import WORK_FOLDER
from dsquant.kernels.products import add_product, apply_linear
from dsquant.kernels.threads import blocks_of, one_thread_an_operation, side_by_side
from dsquant.model.fused_attention import attend
from tests.support.checkpoints import LLAMA, QWEN3, add_tokenizer, make_dense, make_pico_r1

NUMBERS = (1, 3, 8)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of one layer with outlier channels."""
    config = {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 4,
        "n_group": 2,
    }
    return add_tokenizer(make_pico_r1(tmp_path_factory.mktemp("mixture") / "model", outliers=True, **config))


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "width"), [(4096, 256, 768), (33, 2048, 2048), (2049, 1408, 512), (7, 512, 256)]
)
def test_products_do_not_depend_on_the_number_of_threads(num_rows: int, num_columns: int, width: int) -> None:
    inputs_RI, weight_OI = torch.randn(num_rows, width), torch.randn(num_columns, width)
    products, grams = [], []
    for number in NUMBERS:
        with _threads(number), one_thread_an_operation("cpu"):
            products.append(apply_linear(inputs_RI, weight_OI, weight_OI[:, 0]))
            grams.append(torch.zeros(width, width))
            add_product(grams[-1], inputs_RI.T, inputs_RI)
    for product_RO, gram_II in zip(products, grams, strict=True):
        assert torch.equal(product_RO, products[0])
        assert torch.equal(gram_II, grams[0])
    torch.testing.assert_close(products[0], F.linear(inputs_RI, weight_OI, weight_OI[:, 0]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grams[0], inputs_RI.T @ inputs_RI, rtol=1e-4, atol=1e-2)


def test_attention_in_blocks_of_heads_is_attention() -> None:
    query, key, value = torch.randn(1, 6, 600, 192), torch.randn(1, 3, 600, 192), torch.randn(1, 3, 600, 128)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    found = []
    for number in (1, 3):
        with _threads(number), one_thread_an_operation("cpu"):
            found.append(attend(query, key, value, None, None))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_job_uses_its_threads_for_blocks_and_leaves_pytorchs_number_as_it_was() -> None:
    def work(part: int) -> tuple[int, int, bool]:
        side_by_side(str, [1, 2])  # a block that is cut again does its own parts
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    with _threads(3):
        with one_thread_an_operation("cpu"), one_thread_an_operation("cpu"), torch.no_grad():
            assert side_by_side(work, range(9), at_most=2) == [(part, 1, False) for part in range(9)]
            with pytest.raises(ZeroDivisionError):
                side_by_side(lambda part: 1 // part, [1, 0, 1])
        assert torch.get_num_threads() == 3
        with one_thread_an_operation("cuda"):
            assert torch.get_num_threads() == 3


def test_blocks_cover_a_dimension_and_are_worth_a_threads_while() -> None:
    for extent in (0, 1, 255, 512, 4097):
        blocks = blocks_of(extent, work=2**20)
        assert [place for block in blocks for place in range(block.start, block.stop)] == list(range(extent))
        assert all(block.stop - block.start >= 256 - 64 for block in blocks) or len(blocks) == 1
    assert len(blocks_of(4096, work=1)) == 1


@pytest.fixture(scope="module")
def twins(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same job by one thread and by three."""
    folder = tmp_path_factory.mktemp("twins")
    for number in (1, 3):
        with _threads(number):
            dsquant.awq(
                mixture,
                output=folder / str(number),
                to=["awq", "gguf:Q4_K_M"],
                preset="compact",
                group_size=64,
                samples=4,
                seq_len=96,
                evaluate=False,
                progress=False,
            )
    return folder / "1", folder / "3"


@pytest.mark.slow
def test_a_jobs_bytes_do_not_depend_on_the_number_of_threads(twins: tuple[Path, Path]) -> None:
    assert _bytes_of(twins[0]) == _bytes_of(twins[1])


@pytest.mark.slow
def test_an_evaluations_figures_do_not_depend_on_the_number_of_threads(mixture: Path, twins: tuple[Path, Path]) -> None:
    found = []
    for number in (1, 3):
        with _threads(number):
            how = {"texts": ["code"], "prompts": "none", "samples": 4, "seq_len": 64, "progress": False}
            evaluation = dsquant.evaluate(mixture, twins[0] / "awq", **how)
        found.append((evaluation.noise_floor, evaluation.candidates))
    assert found[0] == found[1]


JOBS = {
    "quality": "awq MIXTURE --group-size 64",
    "best": "awq MIXTURE --group-size 64 --preset best",
    "widths": "awq MIXTURE --group-size 64 --target-bits 4.6 --to compressed-tensors",
    "Q4_K_M": "gguf MIXTURE --type Q4_K_M",
    "IQ4_XS": "gguf DENSE --type IQ4_XS",
    "Q2_K": "gguf MIXTURE --type Q2_K",
    "types": "gguf DENSE --target-bits 4.6",
    "wide": "awq WIDE --group-size 64 --preset best",
}


def _start(job: str, models: dict[str, Path], output: Path, threads: int, *more: str) -> subprocess.Popen[bytes]:
    arguments = [str(models.get(word, word)) for word in job.split()]
    command = [sys.executable, "-m", "dsquant.cli", *arguments, "--output", str(output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([*command, "--samples", "6", "--seq-len", "128"], env=environment)


@pytest.fixture(scope="module")
def models(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the slow jobs quantize; one is wide enough for every block to be cut."""
    folder = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 2304, "intermediate_size": 2816, "num_attention_heads": 18, "num_key_value_heads": 6}
    wide |= {"head_dim": 128, "num_hidden_layers": 1}
    dense = add_tokenizer(make_dense(folder / "dense", QWEN3))
    return {"MIXTURE": mixture, "DENSE": dense, "WIDE": add_tokenizer(make_dense(folder / "wide", LLAMA | wide))}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_kind_of_job_writes_the_same_bytes_with_any_number_of_threads(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for threads in (1, 2, 4, 8):
        assert _start(JOBS[name], models, tmp_path / str(threads), threads).wait() == 0
        assert _bytes_of(tmp_path / str(threads)) == _bytes_of(tmp_path / "1"), f"{threads} threads"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "Q4_K_M"])
def test_a_resume_with_another_number_of_threads_writes_the_same_bytes(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    assert _start(JOBS[name], models, tmp_path / "whole", 1).wait() == 0
    job, journal = _start(JOBS[name], models, tmp_path / "resumed", 3), tmp_path / "resumed" / WORK_FOLDER
    while job.poll() is None and not any(path.read_text() for path in journal.glob("journal.jsonl")):
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert journal.exists()
    assert _start(JOBS[name], models, tmp_path / "resumed", 1, "--resume").wait() == 0
    assert _bytes_of(tmp_path / "resumed") == _bytes_of(tmp_path / "whole")
