"""Every command line of README, docs/ and examples/ is one that dsquant takes, and every link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dsquant.cli import main
from dsquant.evaluation.request import EvaluationRequest
from dsquant.releases.recipe import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
SHELL = [path.relative_to(ROOT) for path in sorted((ROOT / "scripts").iterdir())]
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
LAUNCHER = re.compile(r"accelerate launch .*?-m dsquant\.cli ")
# What is called a model in the pages: a name on the hub, or the embedded one.
MODEL = re.compile(r"deepseek-ai/\S+|tiny-r1")
# Later options win: little is calibrated on.
LITTLE = ("--samples", "1", "--seq-len", "16")


def commands_of(text: str) -> list[str]:
    """Returns the lines of shell blocks, those that a backslash continues put together, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [part.strip() for line in lines for part in re.sub(r" +# .*|^#.*", "", line).split("&&") if part.strip()]


def documented() -> Iterator[tuple[str, str]]:
    """Yields each command line, and where it stands."""
    for page in sorted(PAGES):
        for line in commands_of(page.read_text()):
            yield str(page.relative_to(ROOT)), line


def arguments_of(line: str) -> list[str] | None:
    """Returns what dsquant is called with; None where something else is called."""
    program, *arguments = shlex.split(LAUNCHER.sub("dsquant ", line))
    return arguments if program == "dsquant" else None


LINES = sorted({line for _, line in documented() if arguments_of(line) is not None})


def check(arguments: list[str], model: Path, texts: Path) -> None:
    """Parses a command line, and lets those commands that can say what they would do, for a small model."""
    name, *given = arguments
    parameters = main.commands[name].make_context(name, list(given)).params
    instead = {"--calibration": str(texts), "--target-size": "1MiB", "--tensor-type": "ffn=Q8_0"}
    here = [instead.get(before, MODEL.sub(str(model), word)) for before, word in pairwise(["", *given])]
    if name in ("awq", "gguf", "plan") and not MODEL.search(" ".join(given)):
        here.append(str(model))  # not the embedded model, which is larger
    if name in ("awq", "gguf"):
        here += [*LITTLE, *(["--group-size", "64"] if name == "awq" else []), "--dry-run"]
    if name in ("awq", "gguf", "plan"):
        found = CliRunner().invoke(main, [name, *here])
        assert found.exit_code == 0, found.output
    elif name == "eval":
        EvaluationRequest.checked(**{key: value for key, value in parameters.items() if key != "as_json"})
    elif name == "run":
        read_recipe(ROOT / parameters["recipe"])


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_of_the_pages_is_one_that_dsquant_takes(
    line: str, nano_r1: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(line)
    assert arguments is not None
    check(arguments, nano_r1, text_file)
    assert not list(tmp_path.iterdir())


def test_every_command_stands_in_a_page_and_what_else_is_called_is_known() -> None:
    called = {shlex.split(line)[0] for _, line in documented()}
    assert called <= {"dsquant", "accelerate", "curl", "pip", "vllm", "pytest", *(str(path) for path in SHELL)}, called
    assert all(Path(ROOT, word).exists() for word in called if word.startswith("scripts/"))
    assert {arguments[0] for line in LINES if (arguments := arguments_of(line))} >= {
        "awq",
        "eval",
        "gguf",
        "plan",
        "run",
    }


def test_every_command_in_a_sentence_is_one_that_dsquant_takes() -> None:
    """It may leave out what is needed, and stand for several (`dsquant awq | gguf`)."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`(dsquant \w+ [^`]*)`", text):
            name, *given = shlex.split(span)[1:]
            with suppress(click.MissingParameter):
                if "|" not in given and "--help" not in given:
                    main.commands[name].make_context(name, given)


def test_what_else_a_sentence_calls_is_there() -> None:
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
            assert Path(ROOT, *module.split(".")).with_suffix(".py").exists(), f"{page.name}: {module}"
        for script in re.findall(r"`(scripts/[\w.-]+)", text):
            assert Path(ROOT, script).exists(), f"{page.name}: {script}"


def test_the_readmes_torch_is_one_that_the_package_takes() -> None:
    """A newer one from PyTorch's index would be replaced by one with CUDA."""
    bound = re.search(r'"torch>=[\d.]+,(<[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert bound and f'pip install "torch{bound[1]}" --index-url' in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_calls_dsquant_as_it_can_be_called(
    script: Path, nano_r1: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dsquant` and `accelerate` note what they are called with: one argument a line, an empty one behind the last."""
    for program in ("dsquant", "accelerate"):
        note = f'#!/bin/sh\nprintf "%s\\n" "${{0##*/}}" "$@" "" >> {tmp_path}/called\n'
        (tmp_path / program).write_text(note)
        (tmp_path / program).chmod(0o755)
    subprocess.run(["sh", str(script)], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    calls = (tmp_path / "called").read_text().strip().split("\n\n")
    monkeypatch.chdir(tmp_path)
    for call in calls:
        arguments = arguments_of(shlex.join(call.splitlines()))
        assert arguments is not None, call
        check(arguments, nano_r1, text_file)


def test_the_array_hands_each_of_its_recipes_to_the_slurm_script(tmp_path: Path) -> None:
    script = ROOT / "examples" / "array.sbatch"
    (last,) = re.findall(r"--array=0-(\d+)", script.read_text())
    (tmp_path / "dsquant").write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/called\n')
    (tmp_path / "dsquant").chmod(0o755)
    for task in range(int(last) + 1):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", str(script)], cwd=ROOT, env=environment, check=True)
    recipes = (tmp_path / "called").read_text().split()
    assert len(set(recipes)) == int(last) + 1 and all((ROOT / recipe).exists() for recipe in recipes)


def test_every_link_of_the_pages_leads_to_a_file() -> None:
    for page in (*PAGES, *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_example_is_in_the_table_of_examples() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    examples = [path.name for path in (ROOT / "examples").iterdir() if path.is_file() and path.name != "README.md"]
    assert all(f"]({name})" in table for name in examples)


def little(arguments: list[str]) -> list[str]:
    """Returns the same of tiny-r1, with as little work as shows that it works."""
    code = ("--max-tokens", "2") if "--gates" in arguments else ("--prompts", "none")  # gates may be on code
    quantize = ("--no-evaluate", *LITTLE)
    more = {"awq": quantize, "gguf": quantize, "generate": ("--max-tokens", "2"), "eval": (*LITTLE, *code)}
    swap = {"hub-r1": "code", "200GiB": "6MiB"}
    return [swap.get(word, MODEL.sub("tiny-r1", word)) for word in (*arguments, *more.get(arguments[0], ()))]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, _ in documented()}))
def test_the_command_lines_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        if "gates:" in block:
            Path("gates.yaml").write_text(block)
    for name, block in re.findall(
        r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        Path(name).write_text(block)
    for where, line in documented():
        arguments = arguments_of(line)
        if "--tasks" in line and find_spec("lm_eval") is None:
            continue
        if where == page and arguments is not None and arguments[0] != "run":  # recipes have tests of their own
            found = CliRunner().invoke(main, little(arguments))
            assert found.exit_code in ((0, 4, 5) if "--gates" in line else (0,)), f"{line}\n{found.output}"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_with_tiny_r1(script: Path, tmp_path: Path) -> None:
    (tmp_path / "dsquant").write_text(f'#!/bin/sh\nexec {sys.executable} -m dsquant.cli "$@"\n')
    (tmp_path / "dsquant").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MODEL": "tiny-r1", "CALIBRATION": "code"}
    command = ["sh", str(script), *LITTLE]
    subprocess.run(command, cwd=tmp_path, env=environment | {"PROCESSES": "1"}, check=True, timeout=900)


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    little = "samples=1, seq_len=16, "
    block = block.replace('output="out"', f'output="out", {little}evaluate=False')
    block = block.replace('"out/gguf")', f'"out/gguf", {little}prompts="none")')
    found: dict[str, Any] = {}
    exec(block, found)
    assert "mean KL" in found["report"]._repr_html_()
