"""The embedded model is what its card says: R1's layout, trained, small, with a tokenizer like DeepSeek's."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import full_model
from safetensors.torch import load_file

from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.activations import Activations
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import Stream, add_experts, mtp_inputs, run_dense_part

LARGEST_BYTES = 12 * 2**20
SCRIPTS = Path(__file__).parent.parent / "scripts"
R1_KEYS = """architectures attention_bias attention_dropout bos_token_id eos_token_id ep_size first_k_dense_replace
hidden_act hidden_size initializer_range intermediate_size kv_lora_rank max_position_embeddings model_type
moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob num_attention_heads
num_experts_per_tok num_hidden_layers num_key_value_heads num_nextn_predict_layers q_lora_rank qk_nope_head_dim
qk_rope_head_dim quantization_config rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func
tie_word_embeddings topk_group topk_method torch_dtype transformers_version use_cache v_head_dim vocab_size"""
YARN_KEYS = "beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings type"


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the shards hold, undecoded."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def decoded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 weights, block by block and without dsquant's reader."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        weights[name] = tensor.float()
        for (row, column), scale in _blocks(tensors.get(f"{name}_scale_inv")):
            weights[name][128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= scale
    return weights


def _blocks(scales: torch.Tensor | None) -> list[tuple[tuple[int, int], float]]:
    if scales is None:
        return []
    return [((r, c), scale) for r, row in enumerate(scales.tolist()) for c, scale in enumerate(row)]


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


def test_its_config_has_r1s_keys_and_no_others(tiny_r1: Path) -> None:
    config = json.loads((tiny_r1 / "config.json").read_text())
    assert sorted(config) == sorted(R1_KEYS.split())
    assert sorted(config["rope_scaling"]) == YARN_KEYS.split()
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_each_weight_is_in_the_shard_that_the_index_names_and_every_fp8_weight_has_its_scale(tiny_r1: Path) -> None:
    weight_map = json.loads((tiny_r1 / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(tiny_r1.glob("*.safetensors"))
    assert {name: path.name for path in shards for name in load_file(path)} == weight_map
    tensors = stored_tensors(tiny_r1)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            begun = tuple(-(-size // 128) for size in tensor.shape)
            assert tuple(tensors[f"{name}_scale_inv"].shape) == begun, name


def test_its_layers_straddle_shards(tiny_r1: Path) -> None:
    weight_map = json.loads((tiny_r1 / "model.safetensors.index.json").read_text())["weight_map"]
    of_layer = [
        {file for name, file in weight_map.items() if name.startswith(f"model.layers.{layer}.")} for layer in range(5)
    ]
    assert sum(len(files) > 1 for files in of_layer) >= 2


def test_the_mtp_layers_embedding_and_head_are_copies(tiny_r1: Path) -> None:
    tensors = stored_tensors(tiny_r1)
    assert torch.equal(tensors["model.layers.4.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.4.shared_head.head.weight"], tensors["lm_head.weight"])


def test_a_reader_of_the_tests_own_decodes_the_same_weights_as_dsquants(tiny_r1: Path) -> None:
    weights = open_checkpoint(tiny_r1).weights
    for name, weight in decoded(stored_tensors(tiny_r1)).items():
        assert torch.equal(weight, weights[name].float()), name


@pytest.mark.parametrize("norm", ["input", "self_attn.q_a", "self_attn.kv_a", "post_attention"])
def test_its_norms_have_outlier_channels(tiny_r1: Path, norm: str) -> None:
    tensors = stored_tensors(tiny_r1)
    for layer in range(5):
        gain = tensors[f"model.layers.{layer}.{norm}_layernorm.weight"]
        # As trained, before they were put in, no gain was above 2.3 times the median.
        assert gain.float().abs().max() > 5 * gain.float().abs().median()


def test_putting_outlier_channels_in_changes_no_score(tiny_r1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    from tiny_r1 import export
    from tiny_r1.network import TinyR1

    weights = decoded(stored_tensors(tiny_r1))
    changed = export.add_outliers(weights, seed=3)
    assert not torch.equal(changed["model.layers.1.mlp.gate.weight"], weights["model.layers.1.mlp.gate.weight"])
    tokens = held_out_tokens("code", load_tokenizer(tiny_r1), 256, 1)
    model, scores = TinyR1(export.load_config(tiny_r1)), []
    with torch.no_grad():
        for version in (weights, changed):
            model.load_named_weights(version)
            scores.append(model.logits(tokens))
    for before, after in zip(*scores, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)
    for module in [name for name in sys.modules if name.split(".")[0] == "tiny_r1"]:
        monkeypatch.delitem(sys.modules, module)


def test_experts_in_training_compute_and_learn_what_transformers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from tiny_r1 import experts
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    config = DeepseekV3Config(hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, hidden_act="silu")
    layer = DeepseekV3Experts(config)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    layer = layer.to(device).bfloat16().float()  # as rounding of weights is not what is compared
    layer.register_buffer("loads", torch.zeros(8, dtype=torch.int64, device=device))
    hidden_RH = torch.randn(101, 64, generator=generator).bfloat16().float()
    chosen_RK = torch.rand(101, 7, generator=generator).topk(3).indices + 1  # nobody chooses the first
    given = (hidden_RH.to(device), chosen_RK.to(device), torch.rand(101, 3, generator=generator).to(device))

    def run(forward: Any) -> list[torch.Tensor]:
        leaves = [given[0].clone().requires_grad_(), given[2].clone().requires_grad_(), *layer.parameters()]
        output = forward(leaves[0], given[1], leaves[1])
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    layer.config._experts_implementation = "eager"
    wanted, found = run(layer), run(lambda *arguments: experts.experts_forward(layer, *arguments))
    for one, other in zip(wanted, found, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()
    experts.count_loads(layer, given)
    assert torch.equal(layer.loads, chosen_RK.to(device).flatten().bincount(minlength=8))


def test_it_has_learned_python(tiny_r1: Path) -> None:
    weights = decoded(stored_tensors(tiny_r1))
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
    loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 2:].flatten())
    # The frequencies of the very tokens that are to be predicted: no predictor that ignores the context beats them.
    frequencies = torch.bincount(tokens[:, 2:].flatten(), minlength=scores.shape[-1]) / tokens[:, 2:].numel()
    baseline = F.nll_loss(frequencies.log().expand(scores.flatten(0, 1).shape), tokens[:, 2:].flatten())
    assert math.exp(loss) < 10 < math.exp(baseline)


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x ** 2\n", "12345 + 678", "汉字かな", "naïve café — «ok»", "\t\t \r\n"]
)
def test_its_tokenizer_gives_back_what_it_got(tiny_r1: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1
    assert tokenizer.decode(ids[1:]) == text


def test_its_tokenizer_splits_with_deepseeks_patterns(tiny_r1: Path) -> None:
    splits = json.loads((tiny_r1 / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [split["type"] for split in splits] == ["Split", "Split", "Split", "ByteLevel"]
    digits, kanji, words = (split["pattern"]["Regex"] for split in splits[:3])
    assert digits == r"\p{N}{1,3}" and kanji == "[一-龥\u3040-ゟ゠-ヿ]+"
    assert words.startswith("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|") and words.endswith(
        r"|\s+(?!\S)|\s+"
    )
    assert splits[3]["use_regex"] is False


def test_its_special_tokens_are_r1s_and_whole(tiny_r1: Path) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    assert tokenizer.convert_tokens_to_ids(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]) == [0, 1]
    for token in ("<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


def test_its_chat_template_opens_thinking_and_adds_one_bos(tiny_r1: Path) -> None:
    tokenizer = load_tokenizer(tiny_r1)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1?<｜Assistant｜><think>\n"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.count(0) == 1


def test_its_chat_template_deletes_past_reasoning_as_r1s_does(tiny_r1: Path) -> None:
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\none and one\n</think>Two."},
        {"role": "user", "content": "Sure?"},
    ]
    text = load_tokenizer(tiny_r1).apply_chat_template(messages, tokenize=False)
    assert text == ("<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>Two.<｜end▁of▁sentence｜><｜User｜>Sure?")


def test_its_shards_hold_no_code(tiny_r1: Path) -> None:
    assert not list(tiny_r1.rglob("*.py"))
    assert "auto_map" not in json.loads((tiny_r1 / "config.json").read_text())
