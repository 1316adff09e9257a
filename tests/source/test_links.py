"""Nothing is read through a link that leads out of a model, and nothing written or removed through any."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, make_pico_r1

import dsquant
from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError
from dsquant.evaluation.gates import read_gates
from dsquant.files.foreign import find_file
from dsquant.formats.gguf.gguf_weights import gguf_file
from dsquant.formats.safetensors import copied_files
from dsquant.jobs.folder_state import claim
from dsquant.pipeline.inputs import open_model, open_tokenizer
from dsquant.recipes import Recipe, gguf_recipe
from dsquant.releases.recipe import read_recipe
from dsquant.verification.checks import verify

FILES = (
    "config.json", "model.safetensors.index.json", "model-00001.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE",
    "additional_chat_templates/tools.jinja",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one layer, with every file that a release may have."""
    folder = add_tokenizer(
        make_pico_r1(tmp_path / "model", num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0)
    )
    (folder / "additional_chat_templates").mkdir()
    for name in FILES:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


def open_all(model: Path) -> None:
    """Reads everything that a job reads of a checkpoint, but no weights."""
    checkpoint, _ = open_model(str(model))
    open_tokenizer(checkpoint)
    copied_files(model)


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_model_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.move(model / name, secret)
    (model / name).symlink_to(secret)
    with pytest.raises(InputError, match=rf"{name}.*link that leads out.*secret"):
        open_all(model)


def test_links_inside_a_model_and_the_model_itself_may_be_links(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "tokenizer.json", model / "shared")
    (model / "tokenizer.json").symlink_to("shared")
    (tmp_path / "named").symlink_to(model)
    open_all(tmp_path / "named")


def in_hub_cache(model: Path, cache: Path, name: str) -> Path:
    """Lays a model out as huggingface_hub does: links from a commit's folder to blobs."""
    repository = cache / f"models--{name}"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        if path.is_file():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_the_hub_cache_is_read_through_its_links_and_not_another_models(model: Path, tmp_path: Path) -> None:
    snapshot, other = (in_hub_cache(model, tmp_path / "cache", name) for name in ("a--b", "a--c"))
    (tmp_path / "named").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "named"):
        open_all(folder)
        assert "LICENSE" in copied_files(folder)
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(other.parent.parent / "blobs" / "LICENSE")
    with pytest.raises(InputError, match="leads out"):
        open_all(snapshot)


def test_a_gguf_file_in_a_folder_is_no_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.gguf").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    with pytest.raises(InputError, match="leads out"):
        gguf_file(tmp_path / "models")
    assert gguf_file(tmp_path / "models" / "m.gguf")  # named by the user


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):  # the names of sockets are short
        server.bind(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "a named pipe"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "socket": (unix_socket, "a socket"),
    "folder": (Path.mkdir, "a folder"),
}
READERS: dict[str, Callable[[Path], Any]] = {
    **{name: lambda path: open_all(path.parent) for name in FILES[:4]},
    "recipe.yaml": read_recipe,
    "gates.yaml": read_gates,
    "dsquant.json": lambda path: verify(path.parent),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(kind: str, name: str, model: Path) -> None:
    make, words = SPECIAL[kind]
    (model / name).unlink(missing_ok=True)
    make(model / name)
    with pytest.raises(InputError, match=rf"{name} is ({words}|a link that leads out of the output)"):
        READERS[name](model / name)


def test_a_file_of_gigabytes_is_not_read_whole(model: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        os.truncate(model / name, 2**40)
        with pytest.raises(InputError, match=rf"{name} has {2**40} bytes"):
            open_all(model)


def foreign_output(folder: Path, files: Any) -> Path:
    """An output whose record names some files."""
    (folder / ".dsquant-work").mkdir(parents=True)
    (folder / ".dsquant-work" / "job.json").write_text(json.dumps({"recipe": {}, "files": files}))
    return folder


GARBAGE: dict[str, Any] = {
    "parents": ["../victim"],
    "parents inside": ["sub/../../victim"],
    "absolute": ["/etc/victim"],
    "numbers": [7],
    "nothing": [None],
    "null byte": ["a\0b"],
    "itself": ["."],
    "empty": [""],
    "double slash": ["a//b"],
    "half a surrogate pair": ["\ud800"],
    "long": ["x" * 300],
    "a text": "victim",
    "a number": 7,
    "the lock": [".dsquant-work/lock"],
    "a folder": ["folder"],
    "keys": {"../victim": {}},
}


def recipe(output: Path) -> Recipe:
    return gguf_recipe(model="tiny-r1", output=output, type="F16")


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_record_that_names_no_files_of_its_folder_is_refused(kind: str, tmp_path: Path) -> None:
    output = foreign_output(tmp_path / "out", GARBAGE[kind])
    (tmp_path / "victim").write_text("mine")
    (output / "folder").mkdir()
    with pytest.raises(InputError, match="remove"):
        claim(output, recipe(output), resume=False, restart=True)
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("again", ["resume", "restart"])
@pytest.mark.parametrize("place", ["sub", ".dsquant-work/journal.jsonl", "a.safetensors.partial", ".dsquant-work/lock"])
def test_a_job_goes_on_through_no_link(place: str, again: str, tmp_path: Path) -> None:
    output = foreign_output(tmp_path / "out", ["sub/victim", "a.safetensors"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "victim").write_text("mine")
    (output / place).symlink_to(elsewhere if place == "sub" else elsewhere / "victim")
    with pytest.raises(InputError, match=f"{Path(place).name} is a link"):
        claim(output, recipe(output), resume=again == "resume", restart=again == "restart")
    assert (elsewhere / "victim").read_text() == "mine"


def test_a_work_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    foreign_output(tmp_path / "elsewhere", [])
    output = tmp_path / "out"
    output.mkdir()
    (output / ".dsquant-work").symlink_to(tmp_path / "elsewhere" / ".dsquant-work")
    with pytest.raises(InputError, match="is a link"):
        claim(output, recipe(output), resume=False, restart=True)


def test_the_package_itself_may_be_links_into_an_installers_cache() -> None:
    assert find_file(Path(dsquant.__file__).parent / "assets" / "tiny-r1", "config.json")


def test_a_folder_that_is_no_model_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load_tokenizer(tmp_path)
