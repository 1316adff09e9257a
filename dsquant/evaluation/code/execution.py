"""Runs completions with their tests, each in a process of its own: pass@1, and the significance of a difference.

Running code that a language model wrote is dangerous. Each program gets: a new Python without site-packages, an empty
temporary folder, no environment, no standard input, its output discarded; limits on CPU and wall-clock time, memory,
file size, open files and processes. On Linux it also gives up root's user where another can read Python's library, all
capabilities, and the machine's mounts, network and IPC: its folder is a small file system in memory. The kernel opens
only files of its folder and of Python's library for it (Landlock), and refuses every call that is not on a list
(seccomp): without sockets, processes, threads, clocks, and changes of permissions, owners, times and attributes, of its
own files too. An audit hook refuses much of the same once more.

Not covered: this is not a security boundary. The program runs on the same kernel. Each protection is tried
separately, and `Execution.protections` says which held: containers may refuse mounts and namespaces, kernels before
5.13 have no Landlock, macOS and other processors have none of it. Then a program can fill the disk with many small
files, and what only the audit hook guards is open to code that is written to evade it, which does not prevent reading
files either. In all cases a program can see which files there are and how large, though not their content, and code
that wants to can make its tests pass without solving anything: it runs in their interpreter. For models or prompts that
you do not trust, run dsquant itself in a container or a virtual machine without a network.
"""

import json
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from dsquant.errors import UsageError
from dsquant.evaluation.code import sandbox
from dsquant.evaluation.code.drift import Execution
from dsquant.evaluation.code.scratch import remove_tree
from dsquant.evaluation.code.system_calls import allowing_filter
from dsquant.evaluation.intervals import CONFIDENCE, Interval

Outcome = Literal["passed", "failed", "error", "time limit", "memory limit", "killed"]
# Outcomes of a program that was able to reply.
REPLIES: tuple[Outcome, ...] = ("passed", "failed", "error", "memory limit")

CPU_SECONDS = 5
# On a busy machine a program gets less than a whole processor.
WALL_SECONDS = 20
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
FOLDER_BYTES = 2**26
REPLY_BYTES = 2**16
WORKERS = 4


@dataclass(frozen=True)
class ProgramRun:
    """The outcome of one program."""

    outcome: Outcome
    error: str
    """The exception's name; empty where none was raised."""
    protections: tuple[str, ...] = ()
    """The protections that held; empty where it died before it could report them."""
    left_over: str = ""
    """Its folder, where that could not be removed; empty where it is gone."""


def run_program(program: str) -> ProgramRun:
    """Runs a program, which raises where a test fails, under limits; the module says what they do not cover. Raises
    UsageError where the platform has no limits (Windows)."""
    if os.name != "posix":
        raise UsageError("--execute needs a POSIX system, which can limit a program's resources")
    folder = tempfile.mkdtemp(prefix="dsquant-run-")
    try:
        run = _run_in(folder, program)
    finally:
        gone = remove_tree(folder)
    return run if gone else replace(run, left_over=folder)


def _run_in(folder: str, program: str) -> ProgramRun:
    limits = {"seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    limits["folder_bytes"] = FOLDER_BYTES
    reading, writing = os.pipe()
    # A program that does not look for it cannot know what a reply begins with.
    request = {"program": program, "secret": secrets.token_hex(), "reply_fd": writing, "limits": limits}
    request["filter"] = allowing_filter(platform.machine()).hex() if sys.platform == "linux" else ""
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", str(Path(sandbox.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TMPDIR": folder},
            pass_fds=[writing],
            start_new_session=True,
        )
        timed_out = False
        try:
            process.communicate(json.dumps(request).encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        os.set_blocking(reading, False)
        return _outcome(process.returncode, _read(reading), str(request["secret"]), timed_out)
    finally:
        os.close(reading)
        os.close(writing)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a process and of those it may have started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _read(reading: int) -> bytes:
    try:
        return os.read(reading, REPLY_BYTES)
    except BlockingIOError:
        return b""


def _outcome(return_code: int, reply: bytes, secret: str, timed_out: bool) -> ProgramRun:
    """Parses the sandbox's reply: a line of its protections, and one that a program may try to write in its place."""
    first, _, rest = reply.decode(errors="replace").partition("\n")
    protections = tuple(json.loads(first)) if first else ()
    if timed_out or return_code == -signal.SIGXCPU:
        return ProgramRun("time limit", "", protections)
    verdict, _, error = rest.partition("\n")
    for outcome in REPLIES:
        if verdict == f"{secret} {outcome}":
            return ProgramRun(outcome, error, protections)
    return ProgramRun("killed", _ending(return_code), protections)


def _ending(return_code: int) -> str:
    if return_code >= 0:
        return f"exit code {return_code}"
    try:
        return signal.Signals(-return_code).name
    except ValueError:  # real-time signals have no names
        return f"signal {-return_code}"


def run_all(
    programs: Sequence[str], safe_point: Callable[[int, int], None] = lambda done, total: None
) -> list[ProgramRun]:
    """Runs programs, a few at a time.

    `safe_point` is called after each with programs done and programs in all; it may raise to stop.
    """
    found = []
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        try:
            for run in pool.map(run_program, programs):
                found.append(run)
                safe_point(len(found), len(programs))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def compare_runs(
    gold: Sequence[ProgramRun] | None, original: Sequence[ProgramRun], candidate: Sequence[ProgramRun]
) -> Execution:
    """Returns pass@1 of two models' completions of the same tasks, the tasks that they do not share, and McNemar's
    test.

    `gold` are the runs of the tasks' own completions; None where there are none.
    """
    passed = [tuple(run.outcome == "passed" for run in pair) for pair in zip(original, candidate, strict=True)]
    only_original = passed.count((True, False))
    only_candidate = passed.count((False, True))
    seen = dict.fromkeys(word for run in (*original, *candidate) for word in run.protections)
    return Execution(
        tasks=len(passed),
        pass_original=wilson(sum(first for first, _ in passed), len(passed)),
        pass_candidate=wilson(sum(second for _, second in passed), len(passed)),
        pass_gold=sum(run.outcome == "passed" for run in gold) / len(gold) if gold else None,
        only_original=only_original,
        only_candidate=only_candidate,
        p_value=mcnemar(only_original, only_candidate),
        outcomes_original=dict(Counter(run.outcome for run in original)),
        outcomes_candidate=dict(Counter(run.outcome for run in candidate)),
        protections=tuple(seen),
        left_over=tuple(
            dict.fromkeys(run.left_over for run in (*(gold or ()), *original, *candidate) if run.left_over)
        ),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided: of a split at least as uneven.

    Under the null hypothesis each task that only one of two models passes is equally likely to be the first's or the
    second's: a binomial distribution with p = 1/2.
    """
    differing = only_first + only_second
    ways = tail = 1  # of choosing no task
    for count in range(1, min(only_first, only_second) + 1):
        ways = ways * (differing - count + 1) // count
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**differing)))


def wilson(passed: int, tasks: int, confidence: float = CONFIDENCE) -> Interval:
    """Returns a proportion of at least one task with Wilson's score interval (JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = passed / tasks, z * z / tasks
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / tasks + weight / tasks / 4) / (1 + weight)
    low, high = middle - half if passed else 0.0, middle + half if passed < tasks else 1.0
    return Interval(share, low, high, tasks)


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Returns the first proportion less the second of paired trials, with Newcombe's interval.

    Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: Wilson's intervals of the two proportions, combined
    with the correlation of the pairs. The counts are of trials in which both succeed, the first alone, the second
    alone, and neither.
    """
    first, second, correlation = _margins(both, only_first, only_second, neither)

    def combined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = first.estimate - second.estimate
    low = combined(first.estimate - first.low, second.high - second.estimate)
    high = combined(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, difference - low, difference + high, first.units)


def paired_ratio(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Returns the second proportion as a share of the first of paired trials; the first must succeed at least once.

    Donner and Zou, Statistical Methods in Medical Research 21 (2012) 347-359 (MOVER-R): Wilson's intervals of the two
    proportions, combined with the correlation of the pairs.
    """
    below, above, correlation = _margins(both, only_first, only_second, neither)
    top, bottom = above.estimate, below.estimate

    def root(one: float, other: float) -> tuple[float, float]:
        """Returns the middle term at a limit of each proportion, and its distance to the roots."""
        middle = top * bottom - correlation * abs(top - one) * abs(other - bottom)
        return middle, math.sqrt(max(0.0, middle**2 - one * other * (2 * top - one) * (2 * bottom - other)))

    middle, distance = root(above.low, below.high)
    low = above.low * (2 * top - above.low) / (middle + distance) if above.low else 0.0
    middle, distance = root(above.high, below.low)
    high = (middle + distance) / (below.low * (2 * bottom - below.low))
    return Interval(top / bottom, max(0.0, low), high, below.units)


def _margins(both: int, only_first: int, only_second: int, neither: int) -> tuple[Interval, Interval, float]:
    """Returns both proportions, and their correlation with Newcombe's continuity correction."""
    tasks = both + only_first + only_second + neither
    margins = (both + only_first, only_second + neither, both + only_second, only_first + neither)
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(0.0, product - tasks / 2)
    correlation = product / math.sqrt(math.prod(margins)) if all(margins) else 0.0
    return wilson(both + only_first, tasks), wilson(both + only_second, tasks), correlation
