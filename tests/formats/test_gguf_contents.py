"""What goes into a GGUF file: every tensor, values that its blocks can hold, tokens that the embedding has."""

import json
from pathlib import Path
from typing import Any

import gguf as gguf_py
import pytest
import torch
from checkpoints import LLAMA, PICO_R1, QWEN3, add_tokenizer, dense_shapes, random_weights, save_checkpoint, stored
from gguf_files import PLAIN, tensors_of
from gguf_models import ONE_LAYER, make
from safetensors.torch import load_file, save_file

import dsquant
from dsquant.errors import InputError
from dsquant.formats.gguf.metadata import add_tokenizer_keys


@pytest.mark.parametrize("to", ["awq", "gguf:F32"])
@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (LLAMA, "model.layers.0.self_attn.q_proj.bias", "not part of LlamaForCausalLM as config.json describes it"),
        (LLAMA, "model.layers.0.mlp.up_proj.bias", "not part of"),
        (LLAMA, "model.layers.0.self_attn.q_norm.weight", "not part of"),
        (LLAMA, "model.layers.1.mlp.up_proj.weight", "not part of"),
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", "holds other frequencies"),
        (QWEN3, "lm_head.weight", "ties head and embedding, but tensor 'lm_head.weight' is not"),
    ],
)
def test_no_tensor_is_dropped_because_of_what_a_config_says(
    tmp_path: Path, text_file: Path, to: str, config: dict[str, Any], name: str, message: str
) -> None:
    config = config | ONE_LAYER
    shape = {"lm_head.weight": (300, 256), "model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}.get(name, (256,))
    tensors = stored(random_weights({**dense_shapes(config), name: shape}), fp8=False)
    model = add_tokenizer(save_checkpoint(tmp_path / "model", config, tensors), vocabulary=280)
    with pytest.raises(InputError, match=message):
        quantize(model, tmp_path / "out", to, text_file)
    assert not (tmp_path / "out").exists()


def quantize(model: Path, output: Path, to: str, text_file: Path) -> Any:
    if to == "gguf:F32":
        return dsquant.gguf(model, type="F32", output=output, **PLAIN)
    options = {"calibration": [text_file], "samples": 2, "seq_len": 32, "evaluate": False, "progress": False}
    return dsquant.awq(model, to=[to], group_size=64, output=output, **options)


def test_tensors_that_only_repeat_others_are_taken_with_a_notice(tmp_path: Path, text_file: Path) -> None:
    config = QWEN3 | ONE_LAYER
    tensors = stored(random_weights(dense_shapes(config)), fp8=False)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies.to(torch.bfloat16)
    model = add_tokenizer(save_checkpoint(tmp_path / "model", config, tensors), vocabulary=280)
    for to in ("awq", "gguf:F32"):
        result = quantize(model, tmp_path / to, to, text_file)
        assert any("lm_head.weight repeats the embedding" in warning for warning in result.warnings)
    assert "output.weight" not in tensors_of(tmp_path / "gguf:F32")


@pytest.mark.parametrize("fp8", [True, False])
def test_a_value_that_no_block_can_hold_is_found_while_the_source_is_hashed(tmp_path: Path, fp8: bool) -> None:
    model = make(tmp_path / "model", PICO_R1) if fp8 else make(tmp_path / "model", QWEN3)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = next(
        n for n in index["weight_map"] if n.endswith("down_proj.weight_scale_inv" if fp8 else "down_proj.weight")
    )
    path = model / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name] *= 1e9
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"down_proj\.weight' has a value of"):
        dsquant.gguf(model, type="Q8_0", output=tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()  # nothing was begun
    dsquant.gguf(model, type="BF16", output=tmp_path / "bf16", **PLAIN)


@pytest.mark.parametrize(("number", "message"), [
    (300, "has the id 300"), (-1, "id -1"), ("7", "id '7'"), (7, "both the token 7"),
])  # fmt: skip
def test_token_ids_without_a_row_of_the_embedding_or_given_twice_are_refused(
    tmp_path: Path, number: Any, message: str
) -> None:
    model = make(tmp_path / "model", LLAMA)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<more>"] = number
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"tokenizer\.json.*" + message):
        dsquant.gguf(model, type="F32", output=tmp_path / "out", **PLAIN)


def test_a_normalizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", LLAMA)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for normalizer in ({"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": normalizer}))
        add_tokenizer_keys(gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama"), model, 300)
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": lower}))
    with pytest.raises(InputError, match=r"tokenizer\.json: its normalizer .*Lowercase"):
        add_tokenizer_keys(gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama"), model, 300)


def test_an_added_token_without_a_row_of_the_embedding_is_left_out_of_the_file(tmp_path: Path) -> None:
    writer = gguf_py.GGUFWriter(tmp_path / "keys.gguf", "llama")
    assert add_tokenizer_keys(writer, make(tmp_path / "model", LLAMA), 300) == []
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<pad>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    writer = gguf_py.GGUFWriter(tmp_path / "more.gguf", "llama")
    assert add_tokenizer_keys(writer, tmp_path / "model", 300) == ["<pad>"]
    assert len(writer.kv_data[0]["tokenizer.ggml.tokens"].value) == 300
