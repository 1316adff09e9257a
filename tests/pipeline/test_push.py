"""Finished outputs on their way to the hub, which here is a server of the test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_uploads import UploadHub, upload_hub
from small_jobs import FAST

import dsquant
from dsquant.pipeline import job


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    with upload_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server


def test_a_finished_output_is_pushed_without_what_others_put_beside_it_and_again_by_resuming(
    nano_r1: Path, tmp_path: Path, hub: UploadHub
) -> None:
    def make(**more: Any) -> Any:
        return dsquant.awq(
            nano_r1, output=tmp_path / "out", to="awq", calibration="code", push_to="someone/small", **FAST, **more
        )

    assert make().pushed_to == f"{hub.endpoint}/someone/small" and hub.repositories == {"someone/small": True}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files == written
    hub.files.clear()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert make(resume=True).already_finished and hub.files == written


def test_a_push_that_cannot_work_is_refused_before_the_job_begins(
    nano_r1: Path, tmp_path: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "run_job", lambda *_: pytest.fail("the job began"))

    def refused(words: str, error: type[Exception] = dsquant.InputError, name: str = "a/b", **more: Any) -> None:
        with pytest.raises(error, match=words):
            dsquant.awq(nano_r1, output=tmp_path / "out", push_to=name, **{"to": "awq"} | FAST | more)
        assert not (tmp_path / "out").exists()

    hub.writable = False
    refused("403 Forbidden.*give a token that may write there")
    refused("owner and its name, as ORG/NAME", dsquant.UsageError, name="small")
    refused("owner and its name", dsquant.UsageError, name="a/../b")
    refused("holds one format, found awq, gguf:Q8_0", dsquant.UsageError, to=["awq", "gguf:Q8_0"])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("the hub did not take it")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    refused("there is no token; set HF_TOKEN")
