"""Files that are read whole have a bound: what is longer, or no file at all, is refused by its name."""

import os
import shutil
from pathlib import Path

import pytest

import dsquant
from dsquant.calibration.texts import TOKENIZER_FILES, load_tokenizer
from dsquant.errors import InputError

HUGE = 2**31


@pytest.mark.parametrize("kind", ["huge", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *TOKENIZER_FILES])
def test_a_model_file_of_no_sane_size_is_refused_unread(pico_r1: Path, tmp_path: Path, name: str, kind: str) -> None:
    model = Path(shutil.copytree(pico_r1, tmp_path / "model"))
    if kind == "huge":
        (model / name).touch()
        os.truncate(model / name, HUGE)  # a hole
    else:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
    wanted = f"{name} has {HUGE} bytes" if kind == "huge" else f"{name} is a named pipe"
    with pytest.raises(InputError, match=wanted):
        load_tokenizer(model) if name in TOKENIZER_FILES else dsquant.inspect(model)


def test_a_record_of_no_sane_size_is_refused_unread(tmp_path: Path) -> None:
    record = tmp_path / "dsquant.json"
    record.touch()
    os.truncate(record, HUGE)
    with pytest.raises(InputError, match=f"{HUGE} bytes; .* at most"):
        dsquant.verify(tmp_path, progress=False)
    with pytest.raises(InputError, match=f"{HUGE} bytes; .* at most"):
        dsquant.delta(tmp_path, tmp_path, output=tmp_path / "out", progress=False)
