"""`dsquant eval` as a whole: one pass, several candidates, broken ones with their layer, exit codes, bad input."""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import Change, changed_copy, expert_zeroed, nibbles_swapped, router_not_compensated, scale_not_a_number
from checkpoints import LLAMA, add_tokenizer, make_dense
from click.testing import CliRunner
from gguf_files import PLAIN
from streams import plainly_rounded

import dsquant
from dsquant.calibration.texts import held_out_tokens, load_tokenizer
from dsquant.cli import main
from dsquant.errors import InputError, UsageError
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.lockstep import Lockstep
from dsquant.evaluation.opening import open_candidate, open_original
from dsquant.evaluation.results import Evaluation
from dsquant.evaluation.summary import text_scores
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.overlays import Overlay
from dsquant.model.skeleton import Skeleton
from dsquant.source.weights import Weights

SMALL: dict[str, Any] = {"texts": ["code"], "samples": 4, "seq_len": 64, "prompts": "none", "progress": False}


@pytest.fixture(scope="module")
def awq(tiny_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy AWQ checkpoint of tiny-r1."""
    out = tmp_path_factory.mktemp("evaluation") / "awq"
    options = {"to": "awq", "steps": "scales", "samples": 8, "seq_len": 128, "evaluate": False, "progress": False}
    return dsquant.awq(tiny_r1, output=out, **options).folders["awq"]


@pytest.fixture(scope="module")
def evaluation(tiny_r1: Path, awq: Path) -> Evaluation:
    """The healthy candidate beside three broken ones, with gates."""
    original = open_checkpoint(tiny_r1).weights
    mistakes = {
        "router": router_not_compensated(original, 2),
        "zeroed": expert_zeroed(3, 5),
        "swapped": nibbles_swapped(1, "mlp.experts.4.up_proj"),
    }
    broken = [changed_copy(awq, awq.parent / name, change) for name, change in mistakes.items()]
    gates = awq.parent / "gates.yaml"
    gates.write_text("gates:\n- {metric: broken_layers, at_most: 0}\n- {metric: router_overlap, at_least: 0.5}\n")
    return dsquant.evaluate(tiny_r1, awq, *broken, gates=gates, output=awq.parent / "report", **SMALL)


def test_a_healthy_candidate_passes(evaluation: Evaluation) -> None:
    healthy = evaluation.candidates[0]
    assert healthy.verdict == "pass" and not healthy.findings and healthy.first_broken_layer is None
    assert 0 < healthy.mean_kl < 0.05 and healthy.format == "AWQ 4 bits, groups of 128"
    assert evaluation.noise_floor["code"].mean_kl.estimate < 1e-9
    assert "activations are rounded" not in str(evaluation.caveats)


@pytest.mark.parametrize(
    ("name", "layer", "tensor"),
    [
        ("router", 2, "model.layers.2.mlp.gate.weight"),
        ("zeroed", 3, "model.layers.3.mlp.experts.5."),
        ("swapped", 1, "model.layers.1.mlp.experts.4.up_proj.weight"),
    ],
)
def test_a_broken_candidate_fails_and_the_report_names_the_layer(
    evaluation: Evaluation, name: str, layer: int, tensor: str
) -> None:
    found = next(candidate for candidate in evaluation.candidates if candidate.name == name)
    assert (found.verdict, found.first_broken_layer) == ("fail", layer)
    assert {finding.layer for finding in found.findings} == {layer}
    assert f"layer {layer}" in found.findings[0].message and tensor in found.findings[0].message
    worst = max(found.layers, key=lambda one: one.local_error)
    assert worst.index == layer and found.weights[0].name.startswith(tensor)


def test_a_candidate_whose_scores_are_no_numbers_fails_and_is_reported(tiny_r1: Path, awq: Path) -> None:
    broken = changed_copy(awq, awq.parent / "nan", scale_not_a_number(1, "mlp.experts.2.up_proj"))
    gates = awq.parent / "kl.yaml"
    gates.write_text("gates:\n- {metric: mean_kl, at_most: 1}\n")
    found = dsquant.evaluate(tiny_r1, broken, gates=gates, output=awq.parent / "nan-report", **SMALL).candidates[0]
    assert found.verdict == "fail" and found.first_broken_layer == 1
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in found.findings[0].message
    assert "NaN" not in (awq.parent / "nan-report" / "report.json").read_text()


def put_nan(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors[name].view(-1)[1] = math.nan

    return change


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("model.layers.2.self_attn.kv_a_layernorm.weight", "lm_head.weight")
        ),
    ],
)
def test_a_tensor_with_nan_is_named_in_a_candidate_and_refused_in_a_reference(
    tiny_r1: Path, tmp_path: Path, name: str
) -> None:
    broken = changed_copy(tiny_r1, tmp_path / "nan", put_nan(name))
    small = SMALL | {"samples": 1, "seq_len": 64}
    found = dsquant.evaluate(tiny_r1, broken, **small).candidates[0]
    assert f"tensor {name!r} holds values that are not finite" in found.findings[0].message
    with pytest.raises(InputError, match=f"the reference's tensor '{name}' holds NaN or infinity"):
        dsquant.evaluate(broken, tiny_r1, **small)


def test_a_router_that_was_not_compensated_shows_in_its_overlap(evaluation: Evaluation) -> None:
    layers = {candidate.name: candidate.layers[2] for candidate in evaluation.candidates}
    healthy, broken = layers["awq"].router_overlap, layers["router"].router_overlap
    assert healthy is not None and broken is not None
    assert broken.high < healthy.low and layers["router"].load_shift > 3 * layers["awq"].load_shift  # type: ignore[operator]


def test_the_report_file_holds_everything(evaluation: Evaluation, awq: Path) -> None:
    report = json.loads((awq.parent / "report" / "report.json").read_text())
    assert report == json.loads(json.dumps(evaluation.as_json()))
    assert report["schema_version"] == 1 and report["verdict"] == "fail"
    assert [one["first_broken_layer"] for one in report["candidates"]] == [None, 2, 3, 1]
    assert len(report["candidates"][0]["weights"]) == 20 and len(report["candidates"][0]["fingerprint"]) == 64
    assert not list((awq.parent / "report").glob(".dsquant*"))


def test_the_original_has_one_size_in_plan_job_and_evaluation(evaluation: Evaluation, tiny_r1: Path, awq: Path) -> None:
    recorded = json.loads((awq / "dsquant.json").read_text())["source"]["bytes"]
    assert evaluation.reference.size_bytes == recorded == dsquant.plan(tiny_r1).source_bytes
    assert evaluation.candidates[0].size_bytes == open_checkpoint(awq).index.num_bytes


class CountedWeights(Overlay):
    """Counts how often each weight is read."""

    def __init__(self, base: Weights) -> None:
        super().__init__(base)
        self.reads: Counter[tuple[str, int]] = Counter()

    def rows(self, name: str, start_row: int = 0, stop_row: int | None = None) -> torch.Tensor:
        self.reads[name, start_row] += 1
        return self.base.rows(name, start_row, stop_row)


def test_one_pass_reads_every_tensor_once_for_all_texts_and_scores_as_separate_passes_do(
    tiny_r1: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    skeleton, tokenizer = Skeleton(checkpoint), load_tokenizer(tiny_r1)
    candidate = plainly_rounded(checkpoint.weights)
    tokens = {text: held_out_tokens(text, tokenizer, 96, 2) for text in ("code", "wiki")}
    original = CountedWeights(checkpoint.weights)
    together = torch.cat(list(tokens.values()))
    told: list[tuple[int, int, str]] = []
    models = ComparedModels(skeleton, original, {"c": candidate}, 2)
    noise, found = Lockstep(models, together, None, lambda *step: told.append(step)).run()
    total = skeleton.num_layers + 1  # as progress shows them
    assert told[:2] == [(0, total, "model.layers.0 of the original"), (0, total, "model.layers.0 of c")]
    assert told[-1] == (total - 1, total, "vocabulary, part 1 of 1")
    linears = {f"{name}.weight" for layer in skeleton.layers[: skeleton.num_layers] for name in layer.linears}
    names = (*linears, "lm_head.weight", "model.embed_tokens.weight")
    assert {name: original.reads[name, 0] for name in names} == dict.fromkeys(names, 1)
    for number, (text, tokens_NT) in enumerate(tokens.items()):
        models = ComparedModels(skeleton, checkpoint.weights, {"c": candidate}, 2)
        alone = compare(models, tokens_NT, tmp_path)["c"]
        ours, theirs = text_scores(found["c"].tokens.of_samples(2 * number, 2 * number + 2)), text_scores(alone)
        assert ours.mean_kl.estimate == pytest.approx(theirs.mean_kl.estimate, rel=1e-5), text
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-6)
    assert text_scores(noise.tokens).mean_kl.estimate < 1e-9
    # Behind the last layer the lens is the model itself, on some of its tokens.
    assert found["c"].lens_kl[-1] == pytest.approx(float(found["c"].tokens.kl_NT.mean()), rel=0.5)
    assert found["c"].layers[0].local_error == pytest.approx(found["c"].layers[0].hidden_error, rel=0.1)


@pytest.mark.slow
def test_a_gguf_file_can_be_the_reference(tiny_r1: Path, awq: Path, tmp_path: Path) -> None:
    for type_name in ("BF16", "Q8_0"):
        dsquant.gguf(tiny_r1, type=type_name, output=tmp_path / type_name, **PLAIN)
    small = SMALL | {"samples": 1}
    by_file = dsquant.evaluate(tmp_path / "BF16", awq, tmp_path / "Q8_0", **small)
    by_checkpoint = dsquant.evaluate(tiny_r1, awq, tmp_path / "Q8_0", **small)
    assert by_file.texts == by_checkpoint.texts and by_file.reference.format == "GGUF BF16"
    assert any("activations are rounded" in caveat for caveat in by_file.caveats)
    for one, other in zip(by_file.candidates, by_checkpoint.candidates, strict=True):
        assert one.mean_kl == pytest.approx(other.mean_kl, abs=1e-3) and not one.findings


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["eval", *map(str, arguments), "--prompts", "none"])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        pytest.param("{metric: mean_kl, at_most: 1}", 0, marks=pytest.mark.slow),
        ("{metric: mean_kl, at_most: 0.000001}", 4),
        ("{metric: perplexity_ratio, at_most: 1.03}", 5),
    ],
)
def test_gates_decide_the_exit_code(tiny_r1: Path, awq: Path, tmp_path: Path, gate: str, code: int) -> None:
    (tmp_path / "gates.yaml").write_text(f"gates:\n- {gate}\n")
    options = ["--text", "wiki", "--samples", 2, "--seq-len", 128, "--gates", tmp_path / "gates.yaml"]
    assert run(tiny_r1, awq, *options)[0] == code


def test_bad_input_ends_with_code_3_and_says_what_is_wrong(tiny_r1: Path, awq: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF")
    other = changed_copy(awq, tmp_path / "other", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    llama = add_tokenizer(make_dense(tmp_path / "llama", LLAMA))
    cases = {
        (tiny_r1, awq, "--text", empty): "empty.txt.* it has 2 tokens .* a sample needs 512",
        (tiny_r1, awq, "--text", "nowhere.txt"): "'nowhere.txt': no such file, and none of the shipped texts",
        (tiny_r1, other): "num_experts_per_tok is 1, the reference's is 2",
        (tiny_r1, llama): "architecture LlamaForCausalLM, the reference .* is DeepseekV3ForCausalLM",
        (tiny_r1, tmp_path / "nowhere"): "no such folder",
        (tiny_r1, tmp_path / "nowhere.gguf"): "no such file",
        (tiny_r1, cut): "cut.gguf is damaged or no GGUF file: header and tensors do not fit its 4 bytes",
        (tiny_r1, awq, "--output", empty): "empty.txt is a file",
    }
    for arguments, message in cases.items():
        code, output = run(*arguments)
        assert code == 3, (arguments, output)
        assert re.search(message, output), output


def test_a_gguf_file_without_the_package_that_reads_it_is_refused(
    tiny_r1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for models in ((tiny_r1, tmp_path), (tmp_path, tiny_r1)):
        with pytest.raises(
            InputError, match=r"model\.gguf: reading GGUF files needs the package gguf: pip install gguf"
        ):
            dsquant.evaluate(*models, **SMALL)


def test_a_broken_line_of_prompts_is_named_by_its_number(tiny_r1: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f():\\n"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 2: not valid JSON"):
        dsquant.evaluate(tiny_r1, tiny_r1, **SMALL | {"prompts": str(tmp_path / "prompts.jsonl")})


def test_other_vocabularies_are_refused(tiny_r1: Path, awq: Path, pico_r1: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a vocabulary of 300 tokens, the reference's has 1280"):
        dsquant.evaluate(tiny_r1, pico_r1, **SMALL)
    other = changed_copy(awq, tmp_path / "other", lambda tensors: None)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (500, 501))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"a different vocabulary: token 50\d is"):
        dsquant.evaluate(tiny_r1, other, **SMALL)


def test_a_budget_that_cannot_work_is_refused_with_the_number(tiny_r1: Path, awq: Path) -> None:
    with pytest.raises(UsageError, match=r"--memory-budget 100.0 MiB is too small: .* need \d+"):
        dsquant.evaluate(tiny_r1, awq, memory_budget="100MiB", **SMALL)


def test_gates_on_what_is_not_measured_are_refused_at_once(tiny_r1: Path, awq: Path, tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("gates:\n- {metric: mean_kl, text: poems, at_most: 1}\n")
    with pytest.raises(UsageError, match="no text 'poems' is evaluated, only code"):
        dsquant.evaluate(tiny_r1, awq, gates=tmp_path / "gates.yaml", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave is False, the reference's is True"),
        ({"eos_token_id": 7}, "eos_token_id is 7"),
        ({"rope_scaling": "beta_fast"}, "rope_parameters is"),
        ({"rope_scaling": "mscale_all_dim"}, "rope_parameters is"),
    ],
)
def test_a_config_that_engines_would_obey_is_the_references(
    tiny_r1: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = changed_copy(tiny_r1, tmp_path / "other", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    if isinstance(lost := change.get("rope_scaling"), str):
        change = {"rope_scaling": {key: value for key, value in config["rope_scaling"].items() if key != lost}}
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        open_candidate(str(other), open_original(str(tiny_r1)))
