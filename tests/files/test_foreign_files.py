"""Files that others wrote are parsed strictly, in bounded time and memory, and blamed by name."""

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

import dsquant
from dsquant.calibration import tokenizer as tokenization
from dsquant.calibration.texts import load_tokenizer, render_chat
from dsquant.errors import InputError
from dsquant.files.strict_json import parse_json
from dsquant.files.strict_yaml import read_yaml
from dsquant.formats.gguf.file import read_gguf
from dsquant.formats.gguf.gguf_checkpoint import gguf_checkpoint, gguf_tokenizer, read_header
from dsquant.source import shards

BAD_YAML = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", r"line 3: the key 'a' is given twice, first in line 1"),
    "a key twice inside": ("x:\n  - {a: 1,\n     'a': 2}\n", r"line 3: the key 'a' is given twice"),
    "a number twice": ("1: a\n0x1: b\n", r"line 2: the key 1 is given twice"),
    "merged twice": ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a\n", r"line 4: the key '<<' is given twice"),
    "null byte": ('output: "a\\0b"\n', r"line 1: .*null byte"),
    "half a surrogate pair": ('output: "\\ud800"\n', r"line 1: .*surrogate"),
    "not UTF-8": (b"a: \xff\n", r"UnicodeDecodeError"),
    "nested too deeply": ("[" * 500, r"Recursion"),
    "a value in itself": ("a: &a [*a]\n", r"contains itself"),
    "aliases of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{chr(ord(n) - 1)}'] * 10)}]\n" for n in "bcdefghi"),
        r"aliases written out",
    ),
    "a number of 5000 digits": ("a: " + "9" * 5000, r"5000 digits"),
    "a number in base 60": ("a: 1" + ":1" * 50_000, r"digits"),
    "an integer that is none": ("a: !!int ''", r"IndexError"),
    "a date that is none": ("a: 2001-99-99", r"month"),
    "code": ("a: !!python/object/apply:os.getcwd []", r"constructor"),
    "a megabyte": ("#" * 2**20, r"1048576 bytes"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_yaml_that_cannot_be_meant_is_refused(kind: str, tmp_path: Path) -> None:
    content, message = BAD_YAML[kind]
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"x\.yaml.*{message}"):
        read_yaml(path, "recipe")


def test_yaml_with_a_mark_of_byte_order_anchors_and_merged_keys_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("\ufeffa: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml", "recipe") == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 1}}


def test_a_key_given_twice_at_the_end_of_a_large_file_is_found_in_linear_time() -> None:
    keys = [f'"tensor {number}": 0' for number in range(50_000)]
    began = time.process_time()
    with pytest.raises(InputError, match="'tensor 49999' is given twice"):
        parse_json("{" + ",".join([*keys, keys[-1]]) + "}", "index.json")
    assert time.process_time() - began < 5  # two minutes where every key is counted


HEADERS: dict[str, Any] = {
    "a shape without end": {"dtype": "F32", "shape": [9] * 300_000, "data_offsets": [0, 0]},
    "extents of 4000 digits": {"dtype": "F32", "shape": [10**4000] * 8, "data_offsets": [0, 0]},
    "offsets of 4000 digits": {"dtype": "F32", "shape": [1], "data_offsets": [10**4000, 10**4000 + 4]},
    "a negative extent": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
    "negative offsets": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
    "offsets in reverse": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "three offsets": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
    "truth as an extent": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    "a shape that is text": {"dtype": "F32", "shape": "11", "data_offsets": [0, 4]},
    "a dtype that is a list": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    "an unknown dtype": {"dtype": "F4_E2M1" * 10_000, "shape": [1], "data_offsets": [0, 4]},
    "an end behind the file": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "no object": [0],
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_no_file_has_is_refused(kind: str, tmp_path: Path) -> None:
    raw = json.dumps({"a": HEADERS[kind]}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    with pytest.raises(InputError, match=r"x\.safetensors.*tensor 'a'") as refused:
        shards.read_header(path)
    assert len(str(refused.value)) < 1000


@pytest.fixture(scope="module")
def gguf(pico_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file; tests must not change it."""
    output = tmp_path_factory.mktemp("gguf")
    dsquant.gguf(pico_r1, output=output, type="Q8_0", calibration=(), evaluate=False, progress=False)
    return next(output.glob("*.gguf"))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(keys: bytes, num_keys: int = 1, num_tensors: int = 0, tensors: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + tensors


def tensor(*extents: int, kind: int = 0, offset: int = 0) -> bytes:
    return string("t") + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


GGUF = {
    "an array of 10^12 bytes": header(string("a") + struct.pack("<IIQ", 9, 0, 10**12)),
    "an array of 10^12 texts": header(string("a") + struct.pack("<IIQ", 9, 8, 10**12)),
    "an array of many million bytes": header(string("a") + struct.pack("<IIQ", 9, 0, 2**23)) + bytes(2**23),
    "an array of arrays": header(string("a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1)),
    "an unknown type": header(string("a") + struct.pack("<I", 99)),
    "2^63 keys": header(b"", 2**63),
    "2^63 tensors": header(b"", 0, 2**63),
    "a name behind the file": header(struct.pack("<Q", 2**62)),
    "no dimensions": header(b"", 0, 1, tensor()),
    "2^32 - 1 dimensions": header(b"", 0, 1, string("t") + struct.pack("<I", 2**32 - 1)),
    "an extent of nothing": header(b"", 0, 1, tensor(2**40, 0)),
    "extents that overflow": header(b"", 0, 1, tensor(2**40, 2**40)),
    "an unknown tensor type": header(b"", 0, 1, tensor(1, kind=9999)),
    "a tensor behind the file": header(b"", 0, 1, tensor(32, offset=2**40)),
    "alignment 0": header(string("general.alignment") + struct.pack("<II", 4, 0), 1, 1, tensor(1)),
    "tensors that overlap": header(b"", 0, 2, tensor(1) + tensor(1).replace(b"t", b"u")).ljust(256, b"\0"),
    "nothing": b"",
    "no magic": b"GGML" + bytes(100),
    "version 4": b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
}


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_gguf_file_is_read_as_gguf_pys_reader_reads_it(alignment: int | None, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    numbers: dict[str, Any] = {
        "uint8": 200,
        "int8": -5,
        "uint16": 60000,
        "int16": -300,
        "uint32": 2**31,
        "int32": -(2**31),
    }
    numbers |= {"uint64": 2**60, "int64": -(2**60), "float32": 0.1, "float64": 0.1, "bool": True}
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.texts", ["", "a", "\u00e9\n"])
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.flags", [True, False])
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q6_K", "IQ2_XXS", "I32"):
        stored = {"F32": np.float32, "F16": np.float16, "I32": np.int32}.get(kind, np.uint8)
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        shape = (3, 5, 256) if stored != np.uint8 else (3, 5, 256 // block * size)
        values = np.random.default_rng(0).integers(0, 200, shape).astype(stored)
        writer.add_tensor(f"t.{kind}", values, raw_dtype=GGMLQuantizationType[kind] if stored == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, wanted = read_gguf(tmp_path / "x.gguf"), GGUFReader(tmp_path / "x.gguf")
    assert found.keys == {key: one.contents() for key, one in wanted.fields.items() if not key.startswith("GGUF.")}
    for one, other in zip(found.tensors, wanted.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (other.name, other.tensor_type, other.data_offset)
        assert (list(one.shape), one.n_bytes) == (other.shape.tolist(), other.n_bytes)
        assert one.data.dtype == other.data.dtype and np.array_equal(one.data, other.data)


@pytest.mark.parametrize("kind", GGUF)
def test_a_gguf_header_that_no_file_has_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUF[kind])
    began = time.process_time()
    with pytest.raises(InputError, match=r"x\.gguf is damaged or no GGUF file"):
        read_gguf(path)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("seed", range(2))
def test_a_gguf_header_with_wrong_numbers_is_read_or_refused(seed: int, gguf: Path, tmp_path: Path) -> None:
    raw, reader = gguf.read_bytes(), GGUFReader(gguf)
    places = [field.offset for field in reader.fields.values()] + [tensor.field.offset for tensor in reader.tensors]
    draw = random.Random(seed)
    for _ in range(6):
        place = draw.choice(places) + draw.randrange(48)
        value = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**63, 2**64 - 1]))[: draw.choice([1, 4, 8])]
        path = tmp_path / "x.gguf"
        path.write_bytes(raw[:place] + value + raw[place + len(value) :])
        try:
            found = read_header(path)
            gguf_checkpoint(found)
            gguf_tokenizer(found)
        except InputError as error:
            assert "x.gguf" in str(error)


VOCABULARIES: dict[str, dict[str, Any]] = {
    "merges of one part": {"tokenizer.ggml.merges": ["a"]},
    "merges of what is no token": {"tokenizer.ggml.merges": ["never seen"]},
    "merges that are numbers": {"tokenizer.ggml.merges": [1]},
    "merges that are no list": {"tokenizer.ggml.merges": 1},
    "tokens that are a number": {"tokenizer.ggml.tokens": 7},
    "fewer types than tokens": {"tokenizer.ggml.token_type": [1]},
    "an end that is a list": {"tokenizer.ggml.eos_token_id": [1]},
    "another kind": {"tokenizer.ggml.model": "llama"},
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_vocabulary_that_tokenizers_refuses_is_the_files_fault(kind: str, gguf: Path) -> None:
    found = read_header(gguf)
    changed = type(found)(found.file, {**found.keys, **VOCABULARIES[kind]}, found.tensors)
    with pytest.raises(InputError, match=r"\.gguf.*"):
        gguf_tokenizer(changed)


KEYS = ("attention.head_count", "block_count", "embedding_length", "rope.freq_base", "expert_count", "context_length")


@pytest.mark.parametrize("value", [[1, 2], "x", -1, float("nan"), 0, 10**9])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_no_number_of_its_network_is_refused(key: str, value: Any, gguf: Path) -> None:
    found = read_header(gguf)
    changed = type(found)(found.file, {**found.keys, f"deepseek2.{key}": value}, found.tensors)
    try:
        checkpoint = gguf_checkpoint(changed)
        dsquant.model.skeleton.Skeleton(checkpoint)
    except InputError as error:
        assert "gguf" in str(error)
    else:
        assert key == "context_length" or (key, value) in ((KEYS[1], 0), (KEYS[3], 10**9))


TEMPLATES: dict[str, tuple[Any, str]] = {
    "that raises": ("{{ raise_exception('only for chats') }}", "only for chats"),
    "that reaches for Python": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "that never ends": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "that fills the memory": ("{{ 'x' * 10**12 }}", "MemoryError"),
    "that writes a book": ("{{ 'x' * 2**21 }}", "2097152 characters"),
    "that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(Recursion|Timeout)Error"),
    "that is none": ("{% if %}", "TemplateSyntaxError"),
    "that is a number": (5, "TypeError"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_is_the_checkpoints_fault(kind: str, pico_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "TEMPLATE_SECONDS", 0.5)
    tokenizer = load_tokenizer(pico_r1)
    tokenizer.chat_template, message = TEMPLATES[kind]
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(InputError, match=rf"the chat template of .*{pico_r1.name}: .*{message}"):
        render_chat(chat, tokenizer)


def test_an_expression_that_backtracks_for_ever_is_the_tokenizers_fault(pico_r1: Path, tmp_path: Path) -> None:
    content = json.loads((pico_r1 / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((pico_r1 / name).read_text())
    with pytest.raises(InputError, match=rf"the tokenizer of {tmp_path}: .*retry-limit"):
        tokenization.encode("a" * 60 + "b", load_tokenizer(tmp_path))


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": lambda content: content.pop("model"),
    "a model that is a list": lambda content: content.update(model=[]),
    "a vocabulary that is a list": lambda content: content["model"].update(vocab=[]),
    "an id that is a text": lambda content: content["model"]["vocab"].update(x="7"),
    "an added token without content": lambda content: content["added_tokens"][0].pop("content"),
    "added tokens that are a number": lambda content: content.update(added_tokens=5),
    "merges of one part": lambda content: content["model"].update(merges=["a"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_tokenizer_of_another_form_is_refused_by_name(kind: str, pico_r1: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pico_r1, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    DAMAGE[kind](content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer"):
        dsquant.gguf(tmp_path / "model", output=tmp_path / "out", type="F16", calibration=(), progress=False)
    assert not (tmp_path / "out").exists()
