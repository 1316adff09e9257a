"""What is no model in safetensors is named for what it is, with what to do."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsquant.cli import main
from dsquant.errors import InputError
from dsquant.recipes import Recipe
from dsquant.source.locate import locate
from dsquant.source.look_alikes import advice
from dsquant.source.shards import read_header

FOLDERS = {
    "a LoRA adapter of org/base: merge": {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"})},
    "a LoRA adapter: merge": {"adapter_config.json": "damaged", "adapter_model.safetensors": ""},
    "found pytorch_model.bin, pickles.*save_pretrained": {"config.json": "{}", "pytorch_model.bin": ""},
    r"found a\.gguf, which is quantized already": {"a.gguf": ""},
    r"found 1\.safetensors, 2\.safetensors, 3\.safetensors and 1 more without it; .* release's config\.json too": {
        f"{number}.safetensors": "" for number in range(1, 5)
    },
    "interrupted; finish it with --resume": {".dsquant-work/job.json": "{}", "model-00001-of-00002.safetensors": ""},
    "a model is in .*/inner; name that folder": {"inner/config.json": "{}"},
    "is this a model's folder": {"notes.txt": ""},
}


@pytest.mark.parametrize(("said", "files"), FOLDERS.items())
def test_a_folder_is_told_what_it_is(said: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert re.search(said, advice(tmp_path, "config.json"))


@pytest.mark.parametrize("files", [["adapter_config.json"], ["config.json", "pytorch_model.bin"]])
def test_commands_pass_the_advice_on_and_write_nothing(files: list[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in files:
        (model / name).write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    ended = CliRunner().invoke(main, ["awq", str(model), "--output", str(tmp_path / "out")])
    assert ended.exit_code == 3
    assert advice(model, "config.json")[:40] in ended.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "said"), [("a.gguf", "quantized already"), ("model.safetensors", "name .*folder$")])
def test_a_file_is_no_model(name: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "folder" / name
    file.parent.mkdir()
    file.touch()
    with pytest.raises(InputError, match=said):
        locate(str(file))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/cache/models--deepseek-ai--DeepSeek-R1/snapshots/0123456789abcdef0123456789abcdef01234567", "DeepSeek-R1"),
        ("/cache/models--gpt2/snapshots/0123456789abcdef0123456789abcdef01234567/", "gpt2"),
        ("deepseek-ai/DeepSeek-R1", "DeepSeek-R1"),
        ("snapshots/mine", "mine"),
    ],
)
def test_outputs_are_called_after_the_model_and_not_after_a_commit(model: str, name: str) -> None:
    assert Recipe(model=model, output="out", to=("awq",)).model_name == name


def test_a_model_that_is_nowhere_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    for name in (".cache", "a", "b", "model-7b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"no such folder .* holds model-7b\)"):
        locate(str(tmp_path / "modle-7b"))
    with pytest.raises(InputError, match=r"holds a, b, model-7b\)"):
        locate(str(tmp_path / "nothing like it"))
    with pytest.raises(InputError, match=r"not a hub id such as 'org/name'$"):
        locate("https://huggingface.co/org/name")


def test_the_pointer_of_git_lfs_is_no_shard(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=r"model\.safetensors: Git LFS's pointer.*git lfs pull"):
        read_header(shard)
