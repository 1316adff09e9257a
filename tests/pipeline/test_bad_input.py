"""Bad texts, sizes, models and outputs end with exit code 2 or 3, a message that names them, and nothing written."""

import re
from pathlib import Path

import pytest
import torch
from damages import run
from safetensors.torch import save_file

import dsquant
from dsquant.errors import InputError


@pytest.mark.parametrize("option", ["--target-size", "--memory-budget", "--gpu-memory-budget"])
@pytest.mark.parametrize("size", ["", " ", "9" * 400, "inf"])
def test_what_is_no_size_is_refused(nano_r1: Path, text_file: Path, tmp_path: Path, option: str, size: str) -> None:
    code, output = run(nano_r1, text_file, tmp_path / "out", option, size)
    assert code == 2 and "is not a size" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["inf", "nan", "1e308", "0", "-4"])
def test_what_are_no_bits_is_refused(nano_r1: Path, text_file: Path, tmp_path: Path, bits: str) -> None:
    code, output = run(nano_r1, text_file, tmp_path / "out", "--target-bits", bits)
    assert code == 2 and "target_bits" in output


def test_an_empty_calibration_is_refused(nano_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    code, output = run(nano_r1, tmp_path / "empty.txt", tmp_path / "out")
    assert code == 3 and "empty.txt" in output and not (tmp_path / "out").exists()


def test_a_missing_calibration_is_refused(nano_r1: Path, tmp_path: Path) -> None:
    code, output = run(nano_r1, tmp_path / "absent.txt", tmp_path / "out")
    assert code == 3 and "absent.txt" in output and not (tmp_path / "out").exists()


def test_an_output_folder_with_something_in_it_is_refused_and_left_alone(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, output = run(nano_r1, text_file, tmp_path / "out")
    assert code == 3 and "not empty" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_model_that_is_nowhere_is_refused(text_file: Path, tmp_path: Path) -> None:
    code, output = run(tmp_path / "nowhere", text_file, tmp_path / "out")
    assert code == 3 and "nowhere" in output


@pytest.mark.parametrize("name", ["file/below", "x" * 300])
def test_an_output_that_cannot_be_a_folder_is_refused(
    name: str, nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    code, output = run(nano_r1, text_file, tmp_path / name)
    assert code == 3 and ("is a file" in output or "folder's name" in output), output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_with_a_null_byte_is_refused(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder's name"):
        dsquant.awq(nano_r1, output=f"{tmp_path}/out\0", calibration=str(text_file), progress=False)


BAD_TEXTS = {
    "half a surrogate pair": (b'{"text": "\\ud800"}\n', r"line 1.*surrogate"),
    "nested too deeply": (b"[" * 100_000, r"line 1.*deeply"),
    "a number of 5000 digits": (b'{"text": ' + b"9" * 5000 + b"}", r"line 1"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_line_of_calibration_is_refused(kind: str, nano_r1: Path, tmp_path: Path) -> None:
    content, message = BAD_TEXTS[kind]
    (tmp_path / "bad.jsonl").write_bytes(content)
    code, output = run(nano_r1, tmp_path / "bad.jsonl", tmp_path / "out")
    assert code == 3 and re.search(rf"bad\.jsonl, {message}", output, re.DOTALL), output
    assert not (tmp_path / "out").exists()


def test_calibration_tokens_without_columns_are_refused(nano_r1: Path, tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    code, output = run(nano_r1, tmp_path / "tokens.safetensors", tmp_path / "out")
    assert code == 3 and "tokens.safetensors" in output and not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux")
def test_a_text_that_cannot_be_read_is_refused(nano_r1: Path, tmp_path: Path) -> None:
    code, output = run(nano_r1, Path("/proc/self/mem"), tmp_path / "out")
    assert code == 3 and "/proc/self/mem" in output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["hf:../texts", "hf:owner/.."])
def test_a_hub_set_that_is_a_path_is_refused(name: str, nano_r1: Path, tmp_path: Path) -> None:
    code, output = run(nano_r1, Path(name), tmp_path / "out")
    assert code == 3 and "hub" in output and not (tmp_path / "out").exists()
