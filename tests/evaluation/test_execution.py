"""Running completions: what happens to programs that misbehave, and the statistics of what passes."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsquant.evaluation.code import execution
from dsquant.evaluation.code.drift_plan import left_over_caveats
from dsquant.evaluation.code.execution import (
    ProgramRun,
    compare_runs,
    mcnemar,
    paired_difference,
    paired_ratio,
    run_program,
    wilson,
)
from tests.support.evaluations import code_drift

LINUX = sys.platform == "linux"


@pytest.mark.parametrize(
    ("program", "outcome", "error"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3", "failed", "AssertionError"),
        ("def f(:", "error", "SyntaxError"),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "error", "SystemExit"),
        ("import os; os._exit(0)", "killed", "exit code 0"),
        ("def f(): return f()\nf()", "error", "RecursionError"),
        ("input()", "error", "EOFError"),
        ("import numpy", "error", "ModuleNotFoundError"),
        ("x = [0] * 10 ** 9", "memory limit", "MemoryError"),
        ("open('a', 'w').write('x' * 3_000_000)", "error", "OSError"),
        ("if __name__ == '__main__':\n    1 / 0", "passed", ""),
        ("import os, tempfile\ntempfile.TemporaryFile().write(b'a')\nopen(os.devnull, 'w').write('b')", "passed", ""),
        ("import math, collections, re, heapq, itertools, functools, string, random, datetime, bisect", "passed", ""),
    ],
)
def test_a_program_ends_as_it_should(program: str, outcome: str, error: str) -> None:
    run = run_program(program)
    assert (run.outcome, run.error) == (outcome, error)


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.fork()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.remove('/etc/hostname')",
        "open('/tmp/dsquant-should-not-be-here', 'w')",
        "import shutil, os; shutil.rmtree(os.path.expanduser('~'))",
    ],
)
def test_sockets_processes_and_changes_outside_are_refused(program: str) -> None:
    run = run_program(program)
    assert run.outcome == "error" and run.error in ("PermissionError", "FileNotFoundError")
    assert not Path("/tmp/dsquant-should-not-be-here").exists()


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
def test_the_kernel_refuses_sockets_and_threads_where_the_audit_hook_sees_nothing() -> None:
    # _socket.socket raises the audit event; a thread raises none that is refused.
    run = run_program("import _thread; _thread.start_new_thread(print, ())")
    assert run.error == "RuntimeError" and any("closed by seccomp" in words for words in run.protections)


@pytest.mark.skipif(not LINUX, reason="Landlock is Linux's")
def test_the_kernel_refuses_files_that_are_neither_pythons_nor_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    run = run_program(f"open({str(secret)!r}).read()")
    if not any("closed by Landlock" in words for words in run.protections):
        pytest.skip("this kernel has no Landlock")
    assert (run.outcome, run.error) == ("error", "PermissionError")
    assert run_program(f"import os\nos.listdir({str(tmp_path)!r})").error == "PermissionError"
    assert run_program(
        "import os\nos.mkdir('a')\nopen('a/b', 'w').write('c')\nassert os.listdir('a') == ['b']"
    ).outcome == ("passed")


def test_a_program_gets_an_empty_folder_and_no_environment() -> None:
    os.environ["DSQUANT_TEST_SECRET"] = "1"
    program = (
        "import os\nassert os.listdir('.') == []\nassert 'DSQUANT_TEST_SECRET' not in os.environ\n"
        "open('a', 'w').write('hello')\nassert open('a').read() == 'hello'\n"
    )
    assert run_program(program).outcome == run_program(program).outcome == "passed"


def test_endless_loops_and_sleepers_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CPU_SECONDS", 1)
    monkeypatch.setattr(execution, "WALL_SECONDS", 4)
    started = time.monotonic()
    assert run_program("while True: pass").outcome == "time limit"
    assert run_program("import time; time.sleep(60)").outcome == "time limit"
    assert time.monotonic() - started < 20


def test_a_program_that_floods_its_output_neither_hangs_nor_forges_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CPU_SECONDS", 1)
    assert run_program("while True: print('x' * 10 ** 6)").outcome in ("time limit", "killed")
    assert run_program('print({"outcome": "passed"})\nassert False').outcome == "failed"


def test_mcnemar_is_the_binomial_tail() -> None:
    # 1 of 6 differing tasks: 2 * (1 + 6) / 64.
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(4000, 4000) == 1 and mcnemar(3000, 3300) < 0.001


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (passed, tasks), ends in published.items():
        assert (wilson(passed, tasks).low, wilson(passed, tasks).high) == pytest.approx(ends, abs=5e-5)


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda counts: sum(counts) > 1))
def test_intervals_of_pairs_hold_their_estimate_and_turn_round_with_the_pair(counts: tuple[int, ...]) -> None:
    both, first, second, neither = counts
    found, turned = paired_difference(both, first, second, neither), paired_difference(both, second, first, neither)
    assert found.low - 1e-9 <= found.estimate <= found.high + 1e-9
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))
    if both + first:
        ratio = paired_ratio(both, first, second, neither)
        assert 0 <= ratio.low <= ratio.estimate + 1e-9 and ratio.estimate <= ratio.high + 1e-9


def test_what_two_models_pass_is_counted_task_by_task() -> None:
    passed, failed = ProgramRun("passed", ""), ProgramRun("failed", "AssertionError")
    found = compare_runs([passed] * 4, [passed, passed, failed, failed], [passed, failed, passed, failed])
    assert (found.tasks, found.only_original, found.only_candidate, found.p_value) == (4, 1, 1, 1)
    assert found.pass_original.estimate == found.pass_candidate.estimate == 0.5 and found.pass_gold == 1
    assert found.outcomes_original == {"passed": 2, "failed": 2} and found.left_over == ()


def test_folders_that_could_not_be_removed_are_told_of_once() -> None:
    left = ProgramRun("passed", "", left_over="/tmp/dsquant-run-a")
    assert compare_runs(None, [left], [left]).left_over == ("/tmp/dsquant-run-a",)
    drift = code_drift(0.9, executed=True)
    assert drift.execution is not None
    execution = replace(drift.execution, left_over=("/tmp/dsquant-run-a", "/tmp/dsquant-run-b"))
    caveats = left_over_caveats([replace(drift, execution=execution)] * 2)
    assert len(caveats) == 1 and caveats[0].count("/tmp/dsquant-run-a") == 1 and "dsquant-run-b" in caveats[0]
    assert left_over_caveats([drift]) == []


@pytest.mark.skipif(not LINUX, reason="seccomp is Linux's")
@pytest.mark.parametrize(
    "call",
    [
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
        "os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))",
    ],
)
def test_limits_and_priorities_of_other_processes_are_out_of_reach(call: str) -> None:
    run = run_program(f"import os, resource\n{call}\n")
    assert (run.outcome, run.error) == ("error", "PermissionError")


@pytest.mark.parametrize(
    "reply",
    [
        b"[" * 60000,
        b"passed",
        b"passed\n",
        b" passed\n",
        b"\n passed\n\n",
        b"0" * 64 + b" passed\n",
        b'{"outcome": "passed", "error": "", "protections": []}',
        b"\xff\xfe",
    ],
)
def test_a_reply_that_is_not_the_sandboxs_own_counts_as_killed(reply: bytes) -> None:
    run = run_program(
        f"import os\nfor fd in range(3, 32):\n try: os.write(fd, {reply!r})\n except OSError: pass\nos._exit(0)"
    )
    assert (run.outcome, run.error) == ("killed", "exit code 0")
