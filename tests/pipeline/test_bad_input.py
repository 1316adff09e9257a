"""Every kind of bad input ends with exit code 3, a message that names file and tensor, and no output."""

import functools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LLAMA, add_tokenizer, make_dense, put_into_norm
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the shard that holds a tensor."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    (folder / "model-00002.safetensors").unlink(missing_ok=True)


def truncate_shard(folder: Path) -> None:
    path = folder / "model-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_scale(folder: Path) -> None:
    name = f"{EXPERT}_scale_inv"
    edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(name))


def put_nan_into_fp8(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT].view(torch.uint8)[3, 7] = 0x7F

    edit_tensors(folder, EXPERT, change)


def put_infinity_into_bf16(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.weight"][1, 2] = torch.inf

    edit_tensors(folder, "model.layers.1.mlp.gate.weight", change)


def put_nan_into_a_scale(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"][0, 0] = torch.nan

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def misshape_scale(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"] = torch.ones(1, 2)

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def name_an_absent_tensor(folder: Path) -> None:
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": "model-00001.safetensors"})
    )


def leave_the_folder(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "../elsewhere.safetensors"}))


def absolute_path(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "/etc/elsewhere.safetensors"}))


def contradict_the_tensors(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=128))


def one_layer_less(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=1))


def one_layer_more(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=["DeepseekV4ForCausalLM"]))


def sparse_attention(folder: Path) -> None:
    changes = {"index_topk": 2048, "index_n_heads": 64, "architectures": ["DeepseekV32ForCausalLM"]}
    edit_json(folder / "config.json", lambda config: config.update(changes))


def token_without_a_row(folder: Path) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": '"""'})

    edit_json(folder / "tokenizer.json", change)


def no_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("model_type"))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_header(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def header_that_is_no_json(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    path.write_bytes(struct.pack("<Q", 16) + b"x" * 16 + path.read_bytes()[24:])


def config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def scales_of_integers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"] = tensors[f"{EXPERT}_scale_inv"].to(torch.int32)

    edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def weight_of_integers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT] = tensors[EXPERT].to(torch.int8)

    edit_tensors(folder, EXPERT, change)


def overlapping_tensors(folder: Path) -> None:
    path = folder / "model-00001.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [0, end - begin]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def architecture_that_is_no_name(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(architectures=[["x"]]))


def impossible_routing(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_experts_per_tok=7))


def a_thousand_million_layers(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=10**9))


def a_size_that_is_no_number(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(hidden_size="wide"))


def no_block_size(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.pop("quantization_config"))


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def change_fp8(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(changes)
    )


def set_scale(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}_scale_inv"][0, 0] = value

    return lambda folder: edit_tensors(folder, f"{EXPERT}_scale_inv", change)


def edit_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes the text of a shard's header."""

    def damage(folder: Path) -> None:
        path = folder / "model-00001.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        changed = change(raw[8 : 8 + length].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])

    return damage


def extent(text: str) -> Callable[[Path], None]:
    """Puts something else in the place of the first extent of the first shape."""
    return edit_header(lambda header: re.sub(r'("shape":\s*\[)\d+', rf"\g<1>{text}", header, count=1))


def empty_shard(folder: Path) -> None:
    (folder / "model-00001.safetensors").write_bytes(b"")


def a_name_of_300_letters(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: "x" * 300 + ".safetensors"}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (remove_shard, r"model-00002\.safetensors"),
    "truncated shard": (truncate_shard, r"model-00002\.safetensors.*truncated.*tensor 'model\."),
    "missing scale": (remove_scale, rf"model-.*{re.escape(EXPERT)}"),
    "NaN in FP8": (put_nan_into_fp8, rf"model-.*{re.escape(EXPERT)}.*NaN"),
    "infinity in BF16": (put_infinity_into_bf16, r"model-.*layers\.1\.mlp\.gate\.weight.*infinity"),
    "NaN in a scale": (put_nan_into_a_scale, rf"model-.*{re.escape(EXPERT)}_scale_inv"),
    "scale of the wrong shape": (misshape_scale, rf"model-.*{re.escape(EXPERT)}_scale_inv.*\[1, 2\]"),
    "index naming an absent tensor": (name_an_absent_tensor, r"index\.json.*model\.extra\.weight"),
    "path that leaves the folder": (leave_the_folder, r"index\.json.*\.\./elsewhere"),
    "absolute path": (absolute_path, r"index\.json.*/etc/elsewhere"),
    "config that contradicts the tensors": (contradict_the_tensors, r"tensor 'model\.layers.*\[128, 256\]"),
    "config with a layer less": (one_layer_less, r"tensor 'model\.layers"),
    "config with a layer more": (one_layer_more, r"tensor 'model\.layers"),
    "unknown architecture": (unknown_architecture, r"config\.json.*DeepseekV4ForCausalLM"),
    "sparse attention": (sparse_attention, r"config\.json.*DeepseekV32ForCausalLM"),
    "a token without a row in the embedding": (
        token_without_a_row,
        r"text\.txt: it yields token '\"\"\"' \(id 300\).*embed_tokens.*300 rows",
    ),
    "no model_type": (no_model_type, r"config\.json: no model_type"),
    "no tokenizer": (no_tokenizer, r"tokenizer\.json"),
    "damaged header": (broken_header, r"model-00001\.safetensors"),
    "header that is no JSON": (header_that_is_no_json, r"model-00001\.safetensors"),
    "config that is no JSON": (config_that_is_no_json, r"config\.json"),
    "scales of integers": (scales_of_integers, rf"model-.*{re.escape(EXPERT)}_scale_inv.*I32"),
    "weight of integers": (weight_of_integers, rf"model-.*{re.escape(EXPERT)}.*I8"),
    "tensors that overlap": (overlapping_tensors, r"model-00001\.safetensors.*overlap"),
    "architecture that is no name": (architecture_that_is_no_name, r"config\.json.*not supported"),
    "routing that cannot be": (impossible_routing, r"config\.json.*7 of 4 experts"),
    "no groups": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.pop("n_group")),
        "lacks n_group",
    ),
    "groups of one expert": (change_config(n_group=4, topk_group=2), r"config\.json.*groups of one expert.*n_group 4"),
    "absurd number of layers": (a_thousand_million_layers, r"config\.json.*num_hidden_layers is 1000000000"),
    "a thousand million heads": (
        change_config(num_attention_heads=10**9, num_key_value_heads=10**9),
        r"config\.json: num_attention_heads is 10000",
    ),
    "values without end": (change_config(v_head_dim=10**9), r"config\.json: v_head_dim is 10000"),
    "a negative rank": (change_config(kv_lora_rank=-1), r"config\.json: kv_lora_rank is -1"),
    "shared experts without end": (change_config(n_shared_experts=10**9), r"config\.json"),
    "more heads than weights": (
        change_config(num_attention_heads=2**20, num_key_value_heads=2**20, v_head_dim=2**20),
        r"shape",
    ),
    "layers of experts that are not there": (
        change_config(num_hidden_layers=60, num_nextn_predict_layers=0),
        r"config\.json: num_hidden_layers and n_routed_experts make \d+ experts",
    ),
    "a vocabulary that is a list": (change_config(vocab_size=[1]), r"config\.json: vocab_size is \[1\]"),
    "size that is no number": (a_size_that_is_no_number, r"config\.json"),
    "NaN in the config": (change_config(routed_scaling_factor=float("nan")), r"config\.json.*NaN.*not finite"),
    "yarn factor 0": (change_config(rope_scaling={"type": "yarn", "factor": 0}), r"config\.json.*factor 0"),
    "unknown dtype": (change_config(torch_dtype="float99"), r"config\.json.*torch_dtype 'float99'"),
    "end of text outside the vocabulary": (change_config(eos_token_id=300), r"config\.json.*eos_token_id is 300"),
    "static FP8": (change_fp8(activation_scheme="static"), r"config\.json.*activation_scheme 'static'"),
    "another FP8": (change_fp8(fmt="e5m2"), r"config\.json.*fmt 'e5m2'"),
    "negative scale": (set_scale(-1), rf"model-.*{re.escape(EXPERT)}_scale_inv.*negative"),
    "scale out of range": (set_scale(1e38), rf"model-.*{re.escape(EXPERT)}_scale_inv.*overflow"),
    "header given twice": (
        edit_header(lambda header: header.strip()[:-1] + "," + header.strip()[1:]),
        r"model-00001\.safetensors.*given twice",
    ),
    "shape of texts": (extent('"256"'), r"model-00001\.safetensors.*malformed"),
    "infinite shape": (extent("1e400"), r"model-00001\.safetensors.*not finite"),
    "deep header": (edit_header(lambda header: "[" * 100_000), r"model-00001\.safetensors.*deeply"),
    "empty shard": (empty_shard, r"model-00001\.safetensors.*0 bytes"),
    "shard with a name too long": (a_name_of_300_letters, r"index\.json.*xxx"),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json.*deeply"),
    "no block size": (no_block_size, r"config\.json.*weight_block_size|weight_block_size"),
}


IN_A_LATER_LAYER = ("NaN in FP8", "infinity in BF16", "NaN in a scale", "negative scale", "scale out of range")


def run(model: Path, text: Path, output: Path, *more: str) -> tuple[int, str]:
    options = [*more, "--samples", "2", "--seq-len", "16", "--group-size", "64", "--no-evaluate", "--json"]
    arguments = ["awq", str(model), "--calibration", str(text), "--output", str(output), *options]
    result = CliRunner().invoke(main, arguments)
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_refused(kind: str, nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    damage, message = BAD[kind]
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    damage(model)
    code, output = run(model, text_file, tmp_path / "out")
    assert code == 3, output
    assert re.search(message, output, re.DOTALL), output
    assert not (tmp_path / "out" / "dsquant.json").exists()
    # values are seen when they are read for their layer; what headers tell, before anything is written
    assert (tmp_path / "out").exists() == ("finished units stay" in output) == (kind in IN_A_LATER_LAYER)


@pytest.mark.parametrize("preset", ["compact", "best"])
def test_weights_out_of_any_range_end_with_a_message(text_file: Path, tmp_path: Path, preset: str) -> None:
    model = add_tokenizer(make_dense(tmp_path / "model", LLAMA), vocabulary=290)
    for path in model.glob("*.safetensors"):
        save_file({name: part * (1e30 if "_proj" in name else 1) for name, part in load_file(path).items()}, path)
    code, output = run(model, text_file, tmp_path / "out", "--preset", preset)
    assert code == 3 and "the hidden states are not finite" in output, output


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


def test_numbers_that_overflow_in_a_layer_name_it_and_how_to_begin_anew(
    nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(nano_r1, tmp_path / "model")
    change_config(routed_scaling_factor=1e39)(tmp_path / "model")
    code, output = run(tmp_path / "model", text_file, tmp_path / "out")
    assert code == 3 and re.search(r"layers\.\d.*not finite.*2 finished units stay in .*--restart", output), output
    assert (tmp_path / "out" / ".dsquant-work").is_dir() and not (tmp_path / "out" / "dsquant.json").exists()


OUT_OF_RANGE: dict[str, Callable[[Path], Any]] = {
    "a norm": lambda folder: put_into_norm(folder, layer=0, value=3e38),
    "a rope scale": lambda folder: edit_json(
        folder / "config.json", lambda config: config["rope_scaling"].update(mscale=1e38, mscale_all_dim=1e-9)
    ),
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
@pytest.mark.parametrize("command", ["awq", "gguf"])
def test_bad_input_that_shows_in_the_first_layer_leaves_nothing(
    command: str, kind: str, nano_r1: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano_r1, model)
    OUT_OF_RANGE[kind](model)
    (tmp_path / "mine").mkdir()
    options: dict[str, Any] = {"to": ["awq", "compressed-tensors"], "group_size": 64} if command == "awq" else {}
    quantize = functools.partial(getattr(dsquant, command), **options, samples=2, seq_len=16, progress=False)
    for output in (tmp_path / "mine", tmp_path / "new" / "out"):
        with pytest.raises(InputError, match=r"layers\.0.*not finite|not for GGUF: rope scaling"):
            quantize(model, output=output, calibration=str(text_file))
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "new").exists()


def test_the_network_leaves_the_config_as_it_stands(nano_r1: Path) -> None:
    checkpoint = open_checkpoint(nano_r1)
    before = json.dumps(checkpoint.config)
    Skeleton(checkpoint)
    assert json.dumps(checkpoint.config) == before


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
