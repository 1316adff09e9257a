"""Tokenizers with more tokens than the embedding has rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import QWEN2, add_tokenizer, make_dense

import dsquant
from dsquant.calibration.texts import load_tokenizer
from dsquant.errors import InputError
from dsquant.source.vocabulary import check_embedded, set_embedding_rows

FAST: dict[str, Any] = {"samples": 2, "seq_len": 32, "group_size": 64, "evaluate": False, "progress": False}


def make_model(folder: Path, added: Sequence[str], special: bool = True, **special_tokens: str) -> Path:
    """A checkpoint whose embedding has 300 rows, with tokens added to its 300."""
    from tokenizers import AddedToken, Tokenizer

    model = add_tokenizer(make_dense(folder, QWEN2))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=special) for token in added])
    tokenizer.save(str(model / "tokenizer.json"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | special_tokens))
    return model


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a padding token that no text yields; tests leave it as it is."""
    model = make_model(tmp_path_factory.mktemp("vocabulary") / "model", ["<pad>"], pad_token="<pad>")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 300}))  # as fine-tunes save it
    return model


def text_with_pad(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "strange.txt"
    path.write_text("x = 1 <pad> " + text_file.read_text()[:4000])
    return path


@pytest.mark.slow
def test_a_token_that_no_text_yields_is_told_and_does_no_harm(padded: Path, text_file: Path, tmp_path: Path) -> None:
    result = dsquant.awq(padded, output=tmp_path / "out", calibration=(str(text_file),), **FAST)
    assert any("the first is '<pad>', id 300" in warning for warning in result.warnings)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": prompt, "completion": "1"}) + "\n" for prompt in ("x =", "def f(y):"))
    )
    found = dsquant.evaluate(
        padded,
        tmp_path / "out",
        texts=(text_file,),
        samples=1,
        seq_len=32,
        prompts=prompts,
        max_tokens=2,
        progress=False,
    )
    assert any("the first is '<pad>', id 300" in caveat for caveat in found.caveats)
    assert found.candidates[0].drift is not None


def test_a_text_that_yields_it_is_refused_by_name(padded: Path, text_file: Path, tmp_path: Path) -> None:
    strange, refused = text_with_pad(tmp_path, text_file), r"yields token '<pad>' \(id 300\).*only 300 rows"
    with pytest.raises(InputError, match=rf"strange\.txt: it {refused}"):
        dsquant.awq(padded, output=tmp_path / "out", calibration=(str(text_file), str(strange)), **FAST)
    with pytest.raises(InputError, match=rf"strange\.txt: it {refused}"):
        dsquant.gguf(
            padded,
            type="Q8_0",
            output=tmp_path / "out",
            calibration=(str(strange),),
            samples=2,
            seq_len=32,
            progress=False,
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=rf"strange\.txt'?: it {refused}"):
        dsquant.evaluate(padded, padded, texts=(strange,), samples=1, seq_len=32, prompts="none", progress=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "x = <pad>", "completion": "1"}))
    with pytest.raises(InputError, match=f"prompt .*{refused}"):
        dsquant.evaluate(
            padded, padded, texts=(text_file,), samples=1, seq_len=32, prompts=prompts, max_tokens=2, progress=False
        )


def test_an_id_that_not_even_the_vocabulary_names_is_refused(padded: Path) -> None:
    tokenizer = load_tokenizer(padded)
    set_embedding_rows(tokenizer, 300)
    with pytest.raises(InputError, match=r"a text: it yields token .* \(id 5000\)"):
        check_embedded([[1, 5000]], tokenizer, "a text")


@pytest.mark.slow
def test_a_held_out_text_that_yields_one_is_refused_before_anything_is_written(text_file: Path, tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model", ["return"], special=False), tmp_path / "plain.txt"
    text.write_text("a b c d e f g h " * 100)
    with pytest.raises(InputError, match=r"held-out text 'code'.*'return'"):
        dsquant.awq(model, output=tmp_path / "out", calibration=(str(text),), **FAST | {"evaluate": True})
    assert not (tmp_path / "out").exists()
    assert dsquant.awq(model, output=tmp_path / "out", calibration=(str(text),), **FAST).warnings


def test_a_gguf_file_has_as_many_tokens_as_the_embedding_has_rows(padded: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    result = dsquant.gguf(
        padded, type="Q8_0", output=tmp_path / "out", calibration="none", evaluate=False, progress=False
    )
    assert any("left out of GGUF" in warning and "'<pad>'" in warning for warning in result.warnings)
    (file,) = (tmp_path / "out").glob("*.gguf")
    fields = GGUFReader(file).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == 300
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_a_gguf_file_whose_texts_would_end_with_such_a_token_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", ["<pad>", "<end>"], pad_token="<pad>", eos_token="<end>")
    with pytest.raises(InputError, match=r"eos_token is the token 301, and the embedding has 300 rows"):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", calibration="none", evaluate=False, progress=False)
    assert not (tmp_path / "out").exists()
