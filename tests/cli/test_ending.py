"""How commands end: by signals, and where nobody reads what they print."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dsquant.errors import Interrupted
from dsquant.jobs.stopping import stop_on_signals

COMMAND = """
import time, click
from dsquant.cli import main
from dsquant.cli.process import dsquant_command
from dsquant.errors import GateError
from dsquant.jobs.stopping import stop_on_signals

@click.command()
@dsquant_command
def wait():
    print("ready", flush=True)
    time.sleep(60)

@click.command()
@dsquant_command
def job():
    with stop_on_signals() as request:
        print("ready", flush=True)
        while request._signal is None:
            time.sleep(0.01)
        print("asked", flush=True)
        time.sleep(60)

@click.command()
@dsquant_command
def long():
    from rich.console import Console
    for number in range(1000):
        click.echo("x" * 1000)
    Console().print("y" * 10000)
    click.echo("z" * 10000, err=True)
    raise GateError("failed")

@click.command()
@dsquant_command
def leave():
    import atexit
    from dsquant.errors import Interrupted
    atexit.register(time.sleep, 1)
    atexit.register(print, "leaving", flush=True)
    raise Interrupted("stopped")

@click.command()
@dsquant_command
def opened():
    with open(__import__("os").devnull) as file:
        number = file.fileno()
    raise GateError("failed") if number < 3 else SystemExit(0)

for command in (wait, job, long, leave, opened):
    main.add_command(command)
main.add_command(wait, "delta")
main()
"""


def start(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("name", "command", "words"),
    [("SIGINT", "wait", "run it again"), ("SIGTERM", "wait", "run it again"), ("SIGHUP", "delta", "--resume")],
)
def test_a_signal_outside_a_job_ends_a_command_with_75_and_one_line(name: str, command: str, words: str) -> None:
    process = start(command)
    assert told(process) == "ready"
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors.count("\n") == 1 and f"stopped by {name}" in errors and words in errors


def test_ctrl_c_twice_ends_a_job_with_75_and_a_line_each() -> None:
    process = start("job")
    assert told(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert told(process) == "asked"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    first, last = errors.strip().splitlines()
    assert "Ctrl-C once more stops at once" in first and "stopped by SIGINT" in last


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_changes_no_exit_code_that_is_decided(name: str) -> None:
    process = start("leave")
    assert told(process) == "leaving"
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "Traceback" not in errors and "ignored" not in errors


def test_no_file_takes_the_place_of_a_closed_standard_stream() -> None:
    command = f"exec {sys.executable} -c {shlex.quote(COMMAND)} opened 0<&- 1>&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0


def test_a_hangup_stops_a_job_at_its_safe_point_unless_it_is_ignored() -> None:
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with stop_on_signals() as request:
                os.kill(os.getpid(), signal.SIGHUP)
                if handler is signal.SIG_DFL:
                    with pytest.raises(Interrupted, match=r"stopped by SIGHUP at a safe point; .* --resume"):
                        request.safe_point()
                else:
                    request.safe_point()
            assert signal.getsignal(signal.SIGHUP) is handler
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("stdout", "stderr")), "both"]
)
def test_a_reader_who_leaves_changes_neither_the_exit_code_nor_prints_an_error(closed: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ends = {name: writing for name in ("stdout", "stderr") if closed in (name, "both")}
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, "long"],
        stdout=ends.get("stdout", subprocess.PIPE),
        stderr=ends.get("stderr", subprocess.PIPE),
        text=True,
    )
    os.close(writing)
    assert process.returncode == 4
    assert process.stderr is None or "Error" not in process.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_output_that_finds_no_room_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", COMMAND, "long"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 3 and "No space left" in process.stderr and "Traceback" not in process.stderr


def wait_for_moment(process: "subprocess.Popen[str]", seconds: float) -> None:
    """Waits until a process has used so much processor time, or has ended: on a busy machine clocks tell nothing."""
    found = psutil.Process(process.pid)
    while process.poll() is None and sum(found.cpu_times()[:2]) < seconds:
        time.sleep(0.01)


def processor_seconds(command: list[str]) -> float:
    """Runs a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture
def hang_up_ends() -> Iterator[None]:
    """Processes end by SIGHUP, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hang_up_ends")
@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "eval", "awq", "gguf", "run"])
def test_signals_at_any_moment_leave_no_traceback_and_nothing_that_cannot_go_on(command: str, tmp_path: Path) -> None:
    """Python's own first moments, before it looks for dsquant, are not ours: they last a tenth of a second or less."""
    dsquant = [sys.executable, "-m", "dsquant.cli"]
    texts = ["--samples", "2", "--seq-len", "32", "--no-evaluate"]
    made = tmp_path / "made"
    (tmp_path / "recipe.yaml").write_text(
        f"model: tiny-r1\noutput: {tmp_path / 'run'}\nquantize:\n  - {{name: q, type: Q8_0, calibrate: false}}\n"
    )
    arguments = {
        "inspect": ["inspect"],
        "plan": ["plan"],
        "verify": ["verify", str(made)],
        "eval": ["eval", "tiny-r1", "tiny-r1", "--samples", "1", "--seq-len", "64", "--prompts", "none"],
        "awq": ["awq", *texts, "--resume", "--output", str(made)],
        "gguf": ["gguf", "--type", "Q8_0", *texts, "--resume", "--output", str(made)],
        "run": ["run", str(tmp_path / "recipe.yaml")],
    }[command]
    if command == "verify":
        subprocess.run([*dsquant, "awq", *texts, "--output", str(made)], check=True, capture_output=True)
    early = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # before a command runs they end it as they end any process
    whole = 8.0  # of what is resumed, not repeated
    if command in ("inspect", "plan", "verify", "eval"):
        whole = min(15.0, processor_seconds([*dsquant, *arguments]))
    for number in range(9):
        which = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3]
        process = subprocess.Popen([*dsquant, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_moment(process, 0.3 + whole * number / 9)
        process.send_signal(which)
        if which == signal.SIGINT:
            time.sleep(0.05)
            process.send_signal(which)
        output, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 75, *(-one for one in early)), errors
        assert "Traceback" not in output + errors and "ignored" not in errors
    assert subprocess.run([*dsquant, *arguments], capture_output=True).returncode == 0
