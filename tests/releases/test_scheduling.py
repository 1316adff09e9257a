"""The examples under docs/scheduling: parsed or run with the tools themselves where they can be installed."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "scheduling"


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder for PATH with a `dsquant` that notes its arguments and ends as it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "dsquant"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n[ -n "$WAIT" ] && sleep 30\nexit "${{CODE:-0}}"\n')
    script.chmod(0o755)
    return folder


def test_the_crontab_has_five_fields_and_a_command_that_runs(stand_in: Path, tmp_path: Path) -> None:
    (line,) = (line for line in (DOCS / "dsquant.cron").read_text().splitlines() if re.match(r"[\d*]", line))
    *fields, command = line.split(None, 5)
    minute, hour, *rest = fields
    assert 0 <= int(minute) < 60 and 0 <= int(hour) < 24 and rest == ["*", "*", "*"]
    (tmp_path / "dsquant").mkdir()
    environment = {"HOME": str(tmp_path), "PATH": f"{stand_in}:/usr/bin:/bin"}
    subprocess.run(["/bin/sh", "-c", command], env=environment, check=True)
    assert (tmp_path / "called").read_text().split() == ["run", "recipes/r1-awq-4bit.yaml", "--json"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_verifies_service_and_timer(stand_in: Path, tmp_path: Path) -> None:
    units = [shutil.copy(DOCS / name, tmp_path / name) for name in ("dsquant.service", "dsquant.timer")]
    found = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", *map(str, units)],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert found.returncode == 0, found.stderr
    assert "dsquant" not in found.stderr, found.stderr
    calendar = re.search(r"OnCalendar=(.+)", (DOCS / "dsquant.timer").read_text())
    assert calendar is not None
    subprocess.run(["systemd-analyze", "calendar", calendar[1]], check=True, capture_output=True)


def test_the_slurm_script_passes_exit_codes_on_and_queues_again(stand_in: Path, tmp_path: Path) -> None:
    script = DOCS / "dsquant.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    queue = stand_in / "scontrol"
    queue.write_text(f'#!/bin/sh\necho "scontrol $@" >> {tmp_path}/called\n')
    queue.chmod(0o755)
    environment = {"PATH": f"{stand_in}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for code in (0, 4, 75):
        found = subprocess.run(["bash", str(script), "my.yaml"], env=environment | {"CODE": str(code)}, check=False)
        assert found.returncode == code
    assert (tmp_path / "called").read_text().splitlines() == ["run my.yaml --json"] * 3 + ["scontrol requeue 7"]


def test_the_slurm_script_hands_slurms_signal_to_dsquant(stand_in: Path, tmp_path: Path) -> None:
    script = stand_in / "dsquant"
    script.write_text(f"#!{sys.executable}\nimport signal, sys, time\n"
                      "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
                      f"open({str(tmp_path / 'called')!r}, 'w').close()\ntime.sleep(30)\n")  # fmt: skip
    process = subprocess.Popen(["bash", str(DOCS / "dsquant.sbatch")], env={"PATH": f"{stand_in}:/usr/bin:/bin"})
    while process.poll() is None and not (tmp_path / "called").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_the_airflow_example_is_python_and_its_task_knows_the_exit_codes(stand_in: Path) -> None:
    tree = ast.parse((DOCS / "dsquant_dag.py").read_text())
    task = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_recipe")

    class Again(Exception): ...

    class GiveUp(Exception): ...

    class Subprocess:
        """Runs the stand-in whatever folder the example names."""

        code = "0"

        def run(self, arguments: list[str], cwd: str, check: bool) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run([str(stand_in / arguments[0]), *arguments[1:]], env={"CODE": self.code}, check=check)

    names = {"subprocess": Subprocess(), "AirflowException": Again, "AirflowFailException": GiveUp}
    names |= {"RECIPE": "r.yaml", "RESUMABLE": 75}
    exec(compile(ast.Module([task], []), "dag", "exec"), names)
    for code, error in (("75", Again), ("4", GiveUp), ("3", GiveUp)):
        Subprocess.code = code
        with pytest.raises(error):
            names["run_recipe"]()
    Subprocess.code = "0"
    names["run_recipe"]()


def test_every_example_is_named_in_the_table() -> None:
    table = (DOCS / "README.md").read_text()
    assert all(f"({path.name})" in table for path in DOCS.iterdir() if path.name != "README.md")
