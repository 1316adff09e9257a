"""Records of the kinds that data sets have become texts or conversations; whatever else is named with what it holds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsquant.calibration.documents import FOLDERS, HUB_SPEC, documents_of
from dsquant.calibration.records import document_of
from dsquant.calibration.texts import calibration_tokens, load_tokenizer, render_chat
from dsquant.errors import InputError

ROOT = Path(__file__).parents[2]
MIXES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
# The columns that sets on the hub have, each with a value of its kind; (set, config) as `hf:` names them.
HUB: dict[tuple[str, str | None], dict[str, Any]] = {
    ("open-thoughts/OpenThoughts-114k", None): {
        "system": "Think first.",
        "conversations": [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": "2"}],
    },
    ("open-thoughts/OpenThoughts-114k", "metadata"): {
        "problem": "1 + 1?", "deepseek_reasoning": "One more than one.", "deepseek_solution": "2",
        "ground_truth_solution": None, "domain": "math", "source": "x", "test_cases": None, "starter_code": None,
    },
    ("mit-han-lab/pile-val-backup", None): {"text": "A text.", "meta": {"pile_set_name": "x"}},
    ("Salesforce/wikitext", "wikitext-2-raw-v1"): {"text": "A text."},
    ("Salesforce/wikitext", "wikitext-103-raw-v1"): {"text": "A text."},
    ("codeparrot/codeparrot-clean-valid", None): {
        "repo_name": "a/b", "path": "c.py", "copies": "1", "size": "9", "content": "x = 1", "license": "mit",
    },
}  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}


SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}]


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "a", "meta": {}}, "a"),
        ({"content": "a", "license": "mit"}, "a"),
        ({"conversations": SAID}, [user("a"), assistant("b")]),
        ({"system": "s", "messages": [user("a")]}, [{"role": "system", "content": "s"}, user("a")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, [user("a")]),
        ({"messages": CALLED}, [assistant(json.dumps(CALL)), {"role": "tool", "content": "3"}]),
        ({"instruction": "a", "input": "b", "output": "c"}, [user("a\n\nb"), assistant("c")]),
        ({"instruction": "a", "input": "", "output": "c"}, [user("a"), assistant("c")]),
        ({"question": "a", "answer": "b"}, [user("a"), assistant("b")]),
        (
            {"prompt": "a", "reasoning": "r", "completion": "b"},
            [user("a"), assistant("b") | {"reasoning_content": "r"}],
        ),
    ],
)
def test_a_record_of_a_known_kind_is_understood(record: dict[str, Any], document: Any) -> None:
    assert document_of(record, "here") == document


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "a", "id": 1}, "found 'body', 'id'"),
        (["a"], "expected an object"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\]: expected a 'role' .* found 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": 5}]},
            r"messages\[0\]: 'tool_calls' must be a list, found 5",
        ),
        ({"conversations": ["a"]}, r"conversations\[0\]: expected a message"),
    ],
)
def test_another_record_is_named_with_what_it_holds(record: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^here.*{message}"):
        document_of(record, "here")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_a_file_is_taken_by_its_name(tmp_path: Path, suffix: str) -> None:
    import datasets

    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text('{"id": 1, "body": "x"}\n{"id": 2, "body": "y"}\n')
    else:
        datasets.Dataset.from_list([{"id": 1, "body": "x"}, {"id": 2, "body": "y"}]).to_parquet(str(path))
    assert list(documents_of(f"{path}#body")) == ["x", "y"]
    with pytest.raises(InputError, match=rf"a\.{suffix}, \w+ [01]: no column 'text'; found 'id', 'body'"):
        list(documents_of(f"{path}#text"))


def test_a_line_that_is_no_object_has_no_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("5\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: expected an object with a column 'text', found 5"):
        list(documents_of(f"{tmp_path / 'a.jsonl'}#text"))


def test_a_conversation_with_tools_renders_where_the_template_knows_none(tiny_r1: Path) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    messages = [user("a"), assistant("call"), {"role": "tool", "content": "3"}, assistant("b")]
    assert render_chat(messages, tokenizer).startswith("<user>a<assistant>call<user>3b")


def test_a_long_document_is_read_in_parts_without_a_change_to_its_text(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = load_tokenizer(tiny_r1), "def f(x):\n    return x\n" * 200
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr("dsquant.calibration.texts.LONGEST_PART", 100)
    tokens = calibration_tokens([str(tmp_path / "long.txt")], tokenizer, 10_000, 8, 0).tokens
    assert len(tokens) > 100
    long_word = "x" * 1000
    (tmp_path / "word.txt").write_text(long_word)
    assert calibration_tokens([str(tmp_path / "word.txt")], tokenizer, 1, 8, 0).tokens.shape == (1, 8)


def specs() -> Iterator[str]:
    """Every set of the hub that README, a recipe or a mix names."""
    texts = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("*.yaml")), *MIXES]
    for path in texts:
        yield from re.findall(r"hf:[\w.-]+/[\w./:#-]+", path.read_text())


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's sets, as far as they are known here."""
    import datasets

    def load(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert streaming and split in ("train", "validation")
        return [HUB[name, config]]

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_every_set_that_is_named_to_users_gives_documents(hub: None) -> None:
    known = {
        entry["source"]: entry.get("columns") for path in MIXES for entry in yaml.safe_load(path.read_text())["sources"]
    }
    named = {spec for spec in specs() if HUB_SPEC.fullmatch(spec)}
    assert named
    for spec in named:
        assert list(documents_of(spec, known.get(spec)))


def test_the_hub_is_not_blamed_for_a_column_that_a_set_lacks(hub: None) -> None:
    with pytest.raises(InputError, match="no column 'text'; found 'system', 'conversations'") as raised:
        list(documents_of("hf:open-thoughts/OpenThoughts-114k#text"))
    assert "the hub did not" not in str(raised.value)
    conversation = next(documents_of("hf:open-thoughts/OpenThoughts-114k"))
    assert [turn["role"] for turn in conversation] == ["system", "user", "assistant"]


def test_the_help_names_every_mix() -> None:
    from dsquant.recipes import Calibration

    text = str(Calibration.model_fields["calibration"].description)
    assert all(path.stem in text for path in MIXES)
