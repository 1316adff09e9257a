"""The command line: help without torch, wrong usage, plans, JSON, and what the README says of it."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import forked
import pytest
from click.testing import CliRunner

import dsquant
from dsquant.cli import main
from dsquant.errors import UsageError
from dsquant.formats.table import FORMATS
from dsquant.options import format_size, parse_size
from dsquant.recipes import Recipe

README = (Path(__file__).parents[2] / "README.md").read_text()


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_help_imports_no_torch() -> None:
    script = "import sys; from dsquant.cli import main; import dsquant; print([m for m in sys.modules if m in HEAVY])"
    script = f"HEAVY = {{'torch', 'transformers', 'numpy', 'pydantic', 'rich'}}; {script}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_help_and_stands_in_the_readme(command: str) -> None:
    code, _ = invoke(command, "--help")
    assert code == 0 and main.commands[command].help
    assert f"dsquant {command}" in README


def test_the_help_of_awq_lists_every_format() -> None:
    code, output = invoke("awq", "--help")
    listed = output.partition("Formats:")[2]
    assert code == 0 and all(name in listed and known.help for name, known in FORMATS.items())


def test_zero_points_are_the_formats_choice_where_no_option_says_so() -> None:
    for given, wanted in (((), None), (("--symmetric",), True), (("--asymmetric",), False)):
        assert main.commands["awq"].make_context("awq", ["tiny-r1", *given]).params["symmetric"] is wanted


def test_options_in_the_readme_exist() -> None:
    parameters = [item for one in main.commands.values() for item in one.get_params(click.Context(one))]
    known = {option for parameter in parameters for option in parameter.opts}
    commands = re.findall(r"dsquant (?:awq|eval|inspect)[^`\n]*(?:\\\n[^`\n]*)*", README)
    named = {option for command in commands for option in re.findall(r"--[a-z-]+", command)}
    assert named and named <= known


def test_the_public_names_are_there() -> None:
    assert all(hasattr(dsquant, name) for name in dsquant.__all__)


@pytest.mark.parametrize(
    "arguments",
    [
        ["awq", "--bits", "9"],
        ["awq", "--samples", "0"],
        ["awq", "--resume", "--restart"],
        ["awq", "--memory-budget", "much"],
        ["awq", "--no-such-option"],
        ["delta", "--apply", "a.patch", "old", "--output", "/tmp/never-made", "--restart"],
        ["awq", "--bits", "8", "--to", "awq", "--output", "/tmp/never-made"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments: list[str]) -> None:
    code, output = invoke(*arguments)
    assert code == 2, output


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["awq", "tiny-r1", "out"], "--output out"),
        (["gguf", "--type", "Q8_0", "tiny-r1", "out"], "--output out"),
        (["awq", "tiny-r1", "--to", "awq", "mlx"], "add --to mlx"),
        (["gguf", "tiny-r1", "out", "--output", "here"], "(out)\n"),
        (["generate", "tiny-r1", "Write", "a", "test"], "arguments (a test)\n"),
    ],
)
def test_a_word_too_many_is_refused_with_what_was_meant(arguments: list[str], meant: str) -> None:
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2 and meant in found.output


def test_a_dry_run_prints_exact_sizes_and_writes_nothing(nano_r1: Path, text_file: Path, tmp_path: Path) -> None:
    arguments = ["awq", str(nano_r1), "--calibration", str(text_file), "--output", str(tmp_path / "out")]
    arguments += [
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--group-size",
        "64",
        "--no-evaluate",
        "--steps",
        "none",
        "--json",
    ]
    code, output = invoke(*arguments, "--dry-run")
    assert code == 0, output
    assert not (tmp_path / "out").exists()
    plan = json.loads(output)
    code, output = invoke(*arguments)
    assert code == 0, output
    result = json.loads(output)
    assert result["output_bytes"] == plan["output_bytes"]
    assert plan["output_bytes"]["compressed-tensors"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )


def test_inspect_counts_every_byte(nano_r1: Path) -> None:
    code, output = invoke("inspect", str(nano_r1), "--json")
    found = json.loads(output)
    assert code == 0 and found["experts"] == 4 and found["mtp_layers"] == 1
    assert sum(found["bytes_by_kind"].values()) == sum(found["dtypes"].values())


def test_eval_compares_two_checkpoints_on_a_text(nano_r1: Path, text_file: Path) -> None:
    arguments = ["--text", str(text_file), "--seq-len", "32", "--prompts", "none", "--json"]
    code, output = invoke("eval", str(nano_r1), str(nano_r1), *arguments)
    assert code == 0, output
    (found,) = json.loads(output)["candidates"][0]["texts"].values()
    assert found["mean_kl"]["estimate"] < 1e-9 and found["tokens"] == 8 * 31


def test_a_hub_model_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = forked.start(
        "awq", "nobody/no-such-model", "-o", tmp_path / "out",
        environment=environment, before=partial(forked.anew, "huggingface_hub"),
    )  # fmt: skip
    _, errors = found.communicate()
    assert found.returncode == 3 and "nobody/no-such-model" in errors, errors
    assert not (tmp_path / "out").exists()


def test_eval_refuses_another_model(nano_r1: Path, tiny_r1: Path) -> None:
    code, output = invoke("eval", str(nano_r1), str(tiny_r1))
    assert code == 3 and "a vocabulary of 1280 tokens, the reference's has 300" in output


@pytest.mark.parametrize(("text", "size"), [
    ("16GiB", 2**34), ("512 MiB", 2**29), ("1.5g", 3 * 2**29), ("1000", 1000),
    ("131GB", 131 * 10**9), ("64 kB", 64_000),
])  # fmt: skip
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert format_size(size)


@pytest.mark.parametrize(
    "fields", [{"bits": 9}, {"to": ()}, {"to": ("awq", "awq")}, {"samples": 0}, {"colour": "red"}, {"preset": "worst"}]
)
def test_a_recipe_that_cannot_be_meant_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        Recipe.checked(output=tmp_path, **fields)


def test_eval_generates_code_and_writes_three_reports(tiny_r1: Path, text_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "def add(a, b):\n", "completion": "    return a + b\n", "test": "assert add(1, 2) == 3"},
        {"prompt": "def twice(a):\n", "completion": "    return 2 * a\n", "test": "assert twice(1) == 2"},
    ]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["eval", "tiny-r1", str(tiny_r1), "--text", str(text_file), "--samples", "1", "--seq-len", "32"]
    arguments += ["--prompts", str(prompts), "--max-tokens", "8", "--output", str(tmp_path / "report"), "--execute"]
    code, output = invoke(*arguments)
    assert code == 2 and "--allow-code-execution" in output and not (tmp_path / "report").exists()
    code, output = invoke(*arguments, "--allow-code-execution")
    assert code == 0, output
    assert "Generated code against the original's" in output
    found = json.loads((tmp_path / "report" / "report.json").read_text())["candidates"][0]["drift"]
    assert found["candidate_vs_original"]["bleu"] == 1 and found["execution"]["tasks"] == 2
    assert found["execution"]["pass_gold"] == 1 and found["execution"]["p_value"] == 1
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}


def test_eval_names_the_line_of_a_broken_prompt(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt" "c"}\n')
    code, output = invoke("eval", "tiny-r1", "tiny-r1", "--prompts", str(prompts))
    assert code == 3 and "prompts.jsonl, line 3: not valid JSON" in output
