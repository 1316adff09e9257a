"""The embedded model is what its card says: R1's layout, trained, small, with a tokenizer like DeepSeek's."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import full_model

from dsquant.calibration import held_out_tokens, load_tokenizer
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import Stream, add_experts, mtp_inputs, run_dense_part
from dsquant.source.checkpoint import open_checkpoint

LARGEST_BYTES = 12 * 2**20


def test_it_fits_into_twelve_mebibytes(tiny_r1: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_r1.rglob("*")) <= LARGEST_BYTES


def test_it_is_stored_as_r1_is(tiny_r1: Path) -> None:
    index = open_checkpoint(tiny_r1).index
    assert index["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].shape == (192, 256)
    assert index["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    assert index["model.layers.1.mlp.experts.7.down_proj.weight"].dtype == "F8_E4M3"
    assert index["model.layers.1.mlp.experts.7.down_proj.weight_scale_inv"].dtype == "F32"
    assert index["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    assert index["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    assert "model.layers.4.eh_proj.weight" in index and "model.layers.4.shared_head.head.weight" in index
    pairs = [name for name in index if f"{name}_scale_inv" in index]
    assert any(index[name].path != index[f"{name}_scale_inv"].path for name in pairs)


def test_it_has_learned_python(tiny_r1: Path) -> None:
    weights = open_checkpoint(tiny_r1).weights
    tokens = held_out_tokens("code", load_tokenizer(tiny_r1), 256, 4)
    with torch.no_grad():
        logits = full_model(tiny_r1, weights)(tokens).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert math.exp(loss) < 8


def test_its_mtp_layer_predicts_the_token_after_next(tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    skeleton, weights = Skeleton(checkpoint), checkpoint.weights
    tokens = held_out_tokens("code", load_tokenizer(tiny_r1), 256, 4)
    shape = (*tokens.shape, 256)
    hidden, prepared, outputs, mlp = (Activations(torch.zeros(shape)) for _ in range(4))
    model = full_model(tiny_r1, weights)
    with torch.no_grad():
        last = model.model.layers[-1]
        kept = []
        last.register_forward_hook(lambda module, inputs, output: kept.append(output))
        model(tokens)
    hidden.set_samples(0, kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0])
    layer = skeleton.layers[skeleton.num_layers]
    mtp_inputs(skeleton, weights, layer, tokens, Stream(weights, hidden, prepared))
    stream = Stream(weights, prepared, outputs)
    routing = run_dense_part(skeleton, layer, stream, 2, {f"{layer.prefix}.mlp": mlp.recorder()})
    assert routing is not None
    add_experts(skeleton, layer, [(stream, mlp, routing)])
    normed = F.rms_norm(outputs.samples(0, 4), (256,), weights[f"{layer.prefix}.shared_head.norm.weight"], 1e-6)
    scores = F.linear(normed, weights[f"{layer.prefix}.shared_head.head.weight"])[:, :-2]
    assert math.exp(F.cross_entropy(scores.flatten(0, 1), tokens[:, 2:].flatten())) < 10


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x ** 2\n", "12345 + 678", "汉字かな", "naïve café — «ok»", "\t\t \r\n"]
)
def test_its_tokenizer_gives_back_what_it_got(tiny_r1: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1
    assert tokenizer.decode(ids[1:]) == text


def test_its_tokenizer_splits_digits_by_three_as_deepseeks_does(tiny_r1: Path) -> None:
    splits = json.loads((tiny_r1 / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert splits[0]["pattern"]["Regex"] == r"\p{N}{1,3}" and len(splits) == 4


def test_its_shards_hold_no_code(tiny_r1: Path) -> None:
    assert not list(tiny_r1.rglob("*.py"))
    assert "auto_map" not in json.loads((tiny_r1 / "config.json").read_text())
