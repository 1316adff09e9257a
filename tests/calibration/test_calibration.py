"""Calibration texts become the same tokens every time, packed without padding, with reasoning traces kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dsquant.calibration.documents import FOLDERS, HUB_SPEC
from dsquant.calibration.texts import calibration_tokens, held_out_tokens, load_tokenizer, render_chat
from dsquant.errors import InputError, UsageError

CALIBRATION = next(folder for folder in FOLDERS if folder.is_dir())
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tiny_r1: Path) -> Any:
    return load_tokenizer(tiny_r1)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_same_mix_and_seed_give_the_same_tokens_and_another_seed_others(tokenizer: Any) -> None:
    one, two = (calibration_tokens(["r1-mix"], tokenizer, 8, 64, 0) for _ in range(2))
    other = calibration_tokens(["r1-mix"], tokenizer, 8, 64, 1)
    assert torch.equal(one.tokens, two.tokens) and one.sha256 == two.sha256
    assert one.sha256 != other.sha256
    assert one.tokens.shape == (8, 64) and one.tokens.dtype == torch.int64


def test_every_document_has_one_bos_and_one_eos(tokenizer: Any, tmp_path: Path) -> None:
    for number in range(20):
        write(tmp_path / f"{number}.txt", f"def f{number}(x):\n    return x + {number}\n")
    specs = [str(tmp_path / f"{number}.txt") for number in range(20)]
    tokens = calibration_tokens(specs, tokenizer, 1, 8, 0).tokens.flatten().tolist()
    assert tokens[0] == BOS and tokens.count(BOS) == 1
    text = tokenizer.bos_token + "x = 1\n" * 40
    tokens = calibration_tokens([write(tmp_path / "bos.txt", text)], tokenizer, 9, 8, 0).tokens.flatten().tolist()
    assert tokens.count(BOS) <= 1


def test_a_mix_takes_from_its_sources_by_weight(tokenizer: Any) -> None:
    counts = {
        source["name"]: source["samples"] for source in calibration_tokens(["r1-mix"], tokenizer, 20, 64, 0).sources
    }
    assert counts == {"r1-mix:code/*": 10, "r1-mix:reasoning/*": 6, "r1-mix:wiki/*": 4}
    one = calibration_tokens(["r1-mix"], tokenizer, 1, 64, 0)
    assert sum(source["samples"] for source in one.sources) == len(one.tokens) == 1


def test_what_one_source_lacks_another_makes_up_for(tokenizer: Any, tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", "a = 1\n" * 10)
    found = calibration_tokens([short, "code"], tokenizer, 10, 64, 0)
    assert len(found.tokens) == 10


@pytest.mark.parametrize("mix", sorted(path.stem for path in CALIBRATION.glob("*.yaml")))
def test_every_shipped_mix_names_sources_that_exist(mix: str) -> None:
    for entry in yaml.safe_load((CALIBRATION / f"{mix}.yaml").read_text())["sources"]:
        assert entry["weight"] > 0
        spec = entry["source"]
        assert HUB_SPEC.fullmatch(spec) if spec.startswith("hf:") else list(CALIBRATION.glob(spec))


def test_the_last_turns_reasoning_survives_a_template_that_deletes_reasoning(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
    ]
    deleted = [{"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"}]
    assert "Two and two" not in tokenizer.apply_chat_template([messages[0], *deleted], tokenize=False)
    rendered = render_chat(messages, tokenizer)
    assert rendered.count("<think>") == rendered.count("</think>") == 1
    expected = "<｜User｜>What is 2 + 2?<｜Assistant｜><think>\nTwo and two.\n</think>\n\n4"
    assert rendered == tokenizer.bos_token + expected + tokenizer.eos_token


def test_an_answer_without_reasoning_is_rendered_without_an_open_think(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert "think" not in render_chat(messages, tokenizer)


def test_jsonl_and_parquet_hold_texts_or_messages(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    records = [{"text": f"x{number} = {number}\n" * 8} for number in range(40)]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(record) for record in records))
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    assert len(calibration_tokens([lines], tokenizer, 4, 32, 0).tokens) == 4
    assert len(calibration_tokens([str(tmp_path / "a.parquet")], tokenizer, 4, 32, 0).tokens) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": 1}', "expected an object"), ("{", "not valid JSON"), ('{"messages": [{"role": "robot"}]}', "role")],
)
def test_a_bad_line_is_named(tokenizer: Any, tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl, line 2: .*{message}"):
        calibration_tokens([path], tokenizer, 4, 32, 0)


def test_ready_tokens_are_taken_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    tokens = torch.randint(0, 1280, (6, 40))
    save_file({"tokens": tokens}, tmp_path / "t.safetensors")
    found = calibration_tokens([str(tmp_path / "t.safetensors")], tokenizer, 4, 32, 0)
    assert torch.equal(found.tokens, tokens[:4, :32])
    save_file({"tokens": tokens + 5000}, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="outside"):
        calibration_tokens([str(tmp_path / "t.safetensors")], tokenizer, 4, 32, 0)


@pytest.mark.parametrize("spec", ["no-such-mix", "../etc/*", "/nowhere/file.txt", "wiki/../../*"])
def test_what_is_nowhere_is_refused(tokenizer: Any, spec: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        calibration_tokens([spec], tokenizer, 1, 8, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"a\.csv: a table, .* lines of JSON"),
        ("a.json", r"a\.json: records in one JSON text; write one a line"),
        ("a.txt#text", "only .jsonl and .parquet files have columns"),
        (".", "a folder; name each of its files"),
        ("a.txt", "no sample of 64 tokens, they have [1-9][0-9]?; give more text"),
    ],
)
def test_a_file_that_is_no_text_is_told_what_to_do(name: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    for file in ("a.csv", "a.json", "a.txt"):
        (tmp_path / file).write_text("a short text")
    with pytest.raises(InputError, match=message):
        calibration_tokens([str(tmp_path / name)], tokenizer, 1, 64, 0)


def test_hub_specs_name_set_config_split_and_column() -> None:
    match = HUB_SPEC.fullmatch("hf:Salesforce/wikitext/wikitext-2-raw-v1:validation#text")
    assert match is not None
    assert match.groupdict() == {
        "name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "validation", "column": "text",
    }  # fmt: skip
    assert HUB_SPEC.fullmatch("hf:open-thoughts/OpenThoughts-114k")["config"] is None  # type: ignore[index]


def test_a_malformed_hub_spec_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="hf:NAME"):
        calibration_tokens(["hf:a b"], tokenizer, 1, 8, 0)


def test_a_loader_of_the_files_of_the_current_folder_is_no_hub_set(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="text is a loader of local files"):
        calibration_tokens(["hf:text"], tokenizer, 1, 8, 0)


def words(folder: Path) -> list[str]:
    return re.findall(r"\w+", " ".join(path.read_text() for path in sorted(folder.glob("*"))))


@pytest.mark.parametrize("kind", ["code", "wiki", "reasoning"])
def test_no_thirteen_words_of_a_held_out_text_are_in_a_calibration_text(kind: str, tokenizer: Any) -> None:
    assert len(held_out_tokens(kind, tokenizer, 256, 4)) == 4
    seen = set()
    for part in ("code", "wiki", "reasoning"):
        text = words(CALIBRATION / part)
        seen |= {tuple(text[i : i + 13]) for i in range(len(text) - 12)}
    held_out = words(CALIBRATION / "held-out" / kind)
    assert not [held_out[i : i + 13] for i in range(len(held_out) - 12) if tuple(held_out[i : i + 13]) in seen]


def test_jsonl_may_hold_line_separators_and_begin_with_a_byte_order_mark(tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"x = {number}\u2028y = {number}\x85" * 20 for number in range(3)]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "texts.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    assert len(calibration_tokens([str(tmp_path / "texts.jsonl")], tokenizer, 2, 8, 0).tokens) == 2
