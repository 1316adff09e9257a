"""Every kind of bad checkpoint ends with exit code 3, a message that names file and tensor, and no output."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, add_tokenizer, make_dense, put_into_norm
from damages import (
    EXPERT,
    a_name_of_300_letters,
    a_size_that_is_no_number,
    a_thousand_million_layers,
    absolute_path,
    architecture_that_is_no_name,
    broken_header,
    change_config,
    change_fp8,
    config_that_is_no_json,
    contradict_the_tensors,
    edit_header,
    edit_json,
    empty_shard,
    extent,
    header_that_is_no_json,
    impossible_routing,
    leave_the_folder,
    misshape_scale,
    name_an_absent_tensor,
    no_block_size,
    no_model_type,
    no_tokenizer,
    one_layer_less,
    one_layer_more,
    overlapping_tensors,
    put_infinity_into_bf16,
    put_nan_into_a_scale,
    put_nan_into_fp8,
    remove_scale,
    remove_shard,
    run,
    scales_of_integers,
    set_scale,
    sparse_attention,
    token_without_a_row,
    truncate_shard,
    unknown_architecture,
    weight_of_integers,
)
from safetensors.torch import load_file, save_file

import dsquant
from dsquant.errors import InputError
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

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
    "sparse attention without an indexer": (sparse_attention, r"indexer\.wq_b\.weight.* is missing"),
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
