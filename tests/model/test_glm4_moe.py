"""GLM-4.5's family: its forward is transformers', and every format of it is made, verified and read back."""

from pathlib import Path

import gguf as gguf_py
import pytest
import torch
from checkpoints import add_tokenizer, full_model, save_checkpoint
from gguf_files import PLAIN, tensors_of
from glm_checkpoint import GLM, glm_shapes, make_glm
from llama_cpp import every_position
from safetensors.torch import load_file
from streams import stream_logits

import dsquant
from dsquant.errors import InputError
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

TOKENS_NT = torch.randint(6, 280, (2, 96), generator=torch.Generator().manual_seed(3))
# GLM-4.5 has norms of queries and keys, GLM-4.5-Air has none.
AIR = {"use_qk_norm": False}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GLM-4.5 with a tokenizer."""
    return add_tokenizer(make_glm(tmp_path_factory.mktemp("glm") / "model"), vocabulary=280)


def predicted(model: Path) -> torch.Tensor:
    """transformers' log-probabilities [N, T, V]."""
    with torch.no_grad():
        return full_model(model, open_checkpoint(model).weights)(TOKENS_NT).logits.double().log_softmax(-1)


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> float:
    return float((original_NTV.exp() * (original_NTV - candidate_NTV)).sum(-1).mean())


@pytest.mark.parametrize("changes", [{}, AIR, {"attention_bias": False}, YARN], ids=["", "Air", "no bias", "yarn"])
def test_a_streamed_glm_equals_the_whole_model(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = make_glm(tmp_path / "model", **changes)
    weights = open_checkpoint(folder).weights
    with torch.no_grad():
        wanted = full_model(folder, weights)(TOKENS_NT).logits
    found, _ = stream_logits(folder, weights, TOKENS_NT)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_its_network_has_exactly_the_tensors_of_a_release(glm: Path) -> None:
    checkpoint = open_checkpoint(glm)
    assert Skeleton(checkpoint).expected_shapes() == glm_shapes(checkpoint.config)


def test_glm_4_6_leaves_out_the_tables_that_its_mtp_layer_shares(glm: Path, tmp_path: Path) -> None:
    """`model.layers.92.embed_tokens` and `shared_head.head` lie in GLM-4.5's files, and not in GLM-4.6's."""
    shared = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    tensors = {name: tensor for file in glm.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in shared}
    model = add_tokenizer(save_checkpoint(tmp_path / "model", GLM | {"torch_dtype": "bfloat16"}, kept), vocabulary=280)
    (file,) = dsquant.gguf(model, type="BF16", output=tmp_path / "out", mtp="keep", **PLAIN).folders.values()
    assert every_position(file, TOKENS_NT[:1, :8]).isfinite().all()
    without = {name: tensor for name, tensor in kept.items() if name != "model.layers.3.eh_proj.weight"}
    with pytest.raises(InputError, match=r"model\.layers\.3\.eh_proj\.weight' is missing"):
        dsquant.inspect(save_checkpoint(tmp_path / "damaged", GLM, without))


# Activations rounded to 8 bits beside GGUF's types lead some tokens of a random network to other experts.
WITHIN = {"awq": 0.05, "compressed-tensors": 0.05, "gguf:Q4_K_M": 0.2, "gguf:Q8_0": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("awq", "gguf:Q8_0"), ("compressed-tensors", "gguf:Q4_K_M")])
def test_every_format_is_made_verified_and_read_back(tmp_path: Path, text_file: Path, formats: tuple[str, ...]) -> None:
    small = {"num_hidden_layers": 2, "n_routed_experts": 4, "intermediate_size": 128, "moe_intermediate_size": 64}
    glm = add_tokenizer(make_glm(tmp_path / "model", **small), vocabulary=280)
    options = {"samples": 8, "seq_len": 32, "group_size": 64, "steps": "scales", "evaluate": False, "progress": False}
    result = dsquant.awq(glm, to=list(formats), output=tmp_path / "out", mtp="quantize", **options)
    assert dsquant.verify(tmp_path / "out", source=glm, progress=False).ok
    measured = {"texts": [text_file], "seq_len": 32, "samples": 2, "prompts": "none", "progress": False}
    candidates = dsquant.evaluate(glm, *result.folders.values(), **measured).candidates
    for (name, folder), candidate in zip(result.folders.items(), candidates, strict=True):
        assert 0 < candidate.texts["text.txt"].mean_kl.estimate < WITHIN[name], name
        assert not any("router" in finding for finding in candidate.findings)
        if folder.suffix == ".gguf":
            assert divergence(predicted(glm), every_position(folder, TOKENS_NT)) < WITHIN[name]


@pytest.mark.parametrize(
    ("changes", "within"), [({}, 1e-5), (AIR | YARN, 1e-5)], ids=["GLM-4.5", "GLM-4.5-Air with yarn"]
)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, changes: dict[str, object], within: float) -> None:
    model = add_tokenizer(make_glm(tmp_path / "model", **changes), vocabulary=280)
    (file,) = dsquant.gguf(model, type="F32", output=tmp_path / "out", mtp="keep", **PLAIN).folders.values()
    assert divergence(predicted(model), every_position(file, TOKENS_NT)) < within
    keys = gguf_py.GGUFReader(file).fields
    assert keys["glm4moe.rope.dimension_count"].contents() == 32 and keys["glm4moe.block_count"].contents() == 4
    assert keys["glm4moe.nextn_predict_layers"].contents() == 1
    assert tensors_of(tmp_path / "out").keys() >= {"blk.3.nextn.eh_proj.weight", "blk.0.post_attention_norm.weight"}
    original = open_original(str(file))  # alone, from its keys
    assert original.checkpoint.config["partial_rotary_factor"] == 0.5
    open_candidate(str(model), original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": None}, "lacks head_dim"),
        ({"n_shared_experts": 0}, "without a shared expert"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts cannot be chosen"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"sliding_window": 64}, "sliding_window 64"),
    ],
)
def test_what_no_glm_computes_is_refused_by_name(glm: Path, changes: dict[str, object], message: str) -> None:
    checkpoint = open_checkpoint(glm)
    checkpoint.config.update(changes)
    with pytest.raises(InputError, match=message):
        Skeleton(checkpoint)


def test_a_gguf_file_that_rotates_whole_heads_is_another_model(glm: Path, tmp_path: Path) -> None:
    (file,) = dsquant.gguf(glm, type="F32", output=tmp_path / "out", **PLAIN).folders.values()
    original = open_original(str(glm))
    open_candidate(str(file), original)
    other = make_glm(tmp_path / "other", partial_rotary_factor=1.0)
    with pytest.raises(InputError, match="rope_parameters is"):
        open_candidate(str(other), original)
