"""examples/quickstart.ipynb runs, and every result shows itself."""

import ast
import dataclasses
import inspect
import os
import re
import sys
import typing
from itertools import count
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import dsquant
import dsquant.api
from dsquant.reporting.progress import Progress
from dsquant.reporting.terminal import progress_bar

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of this very interpreter, with this tree's dsquant."""
    folder = tmp_path / "kernels" / "here"
    folder.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (folder / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "here", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{QUICKSTART.parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return "here"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_quickstart_notebook_runs_and_shows_tables_and_plots(kernel: str, tmp_path: Path) -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    client = NotebookClient(notebook, timeout=180, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [
        output["data"].get("text/html", "")
        for cell in cells
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    html = "\n".join(shown)
    for wanted in ("11.6 MiB", "compressed-tensors", "<svg", "findings", "q8: gguf:Q8_0"):
        assert wanted in html, wanted
    assert cells[-2].outputs[0]["data"]["text/plain"] == "True"
    printed = [output for output in cells[-1].outputs if output.output_type == "stream" and output.name == "stdout"]
    assert printed[0].text.startswith("InputError\n3\n")
    assert "quantizing ━━━━━━━━━━━━ 100%" in cells[3].outputs[0]["data"]["text/plain"]
    errors = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not errors
    warned = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not warned


def test_the_notebook_in_the_repository_holds_the_outputs_of_a_whole_run() -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # by scripts/notebook
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    written = QUICKSTART.read_text()
    assert "<svg" in written and "━━━ 100%" in written and str(Path.home()) not in written
    assert len(written) < 300_000


def test_a_notebooks_progress_is_text_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.DisplayHandle.display", lambda _, text, raw: shown.append(text["text/plain"]))
    monkeypatch.setattr("IPython.display.DisplayHandle.update", lambda _, text, raw: shown.append(text["text/plain"]))
    with progress_bar() as report:
        report(Progress("quantize", 1, 4, "model.layers.1.mlp.experts.3"))
        report(Progress("evaluate", 0, 4, "model.layers.0 of awq"))
    assert shown[0].startswith("quantizing ━━━─────────  25%") and shown[0].endswith("layer 1 expert 3")
    assert shown[-1].splitlines()[0].startswith("quantizing ━━━━━━━━━━━━ 100%") and "layer" not in shown[-1]


def test_a_log_gets_a_line_a_minute_before_the_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count(0, 25)
    monkeypatch.setattr("dsquant.reporting.terminal.time.monotonic", lambda: float(next(clock)))
    with progress_bar() as report:
        for done in range(6):
            report(Progress("quantize", done, 6, f"model.layers.{done}", bytes_read=2**20))
        lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 6 and all(re.match(r"quantizing [━─]+ .*MiB read", line) for line in lines)
    assert "100%" in capsys.readouterr().err


def test_the_notebooks_calls_are_calls_that_dsquant_takes() -> None:
    code = "\n".join(cell.source for cell in nbformat.read(QUICKSTART, as_version=4).cells if cell.cell_type == "code")
    calls = [
        node for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("dsquant.")
    ]  # fmt: skip
    assert len(calls) >= 4
    for call in calls:
        function = getattr(dsquant, ast.unparse(call.func).removeprefix("dsquant."))
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(function).bind(*call.args, **named)


def test_every_command_is_a_function_whose_result_has_a_type_and_shows_itself() -> None:
    from dsquant.cli import main

    names = {"eval": "evaluate"}
    for command in main.commands.keys() - {"generate", "chat"}:  # whose result is a text
        function = getattr(dsquant, names.get(command, command))
        result = typing.get_type_hints(function, vars(dsquant.api) | _result_types())["return"]
        assert dataclasses.is_dataclass(result), command
        assert hasattr(result, "_repr_html_"), result
        assert hasattr(result, "as_json") or command == "inspect"


def _result_types() -> dict[str, type]:
    """What api.py imports for type checkers alone."""
    from dsquant.deployment.forecast import Forecast
    from dsquant.deployment.inspection import Inspection
    from dsquant.evaluation.results import Evaluation
    from dsquant.incremental.applying import AppliedPatch
    from dsquant.incremental.release import Delta
    from dsquant.pipeline.result import Result
    from dsquant.releases.release_job import Release
    from dsquant.verification.checks import Verification

    types = (Forecast, Evaluation, AppliedPatch, Delta, Inspection, Result, Release, Verification)
    return {found.__name__: found for found in types} | {"Sequence": typing.Sequence}
