"""Runs completions with their tests, each in a process of its own: pass@1, and what can be said of a difference.

Running what a language model wrote is dangerous. Each program gets: a new Python without site-packages, an empty
temporary folder, no environment, no standard input, its output thrown away; limits on CPU and wall-clock time, memory,
size of files, open files and processes. On Linux the kernel refuses it sockets, processes and threads (seccomp), and
every file but those of its folder and of Python's library (Landlock). An audit hook refuses the same once more.

What is not covered: this is no security boundary. The program runs as the same user on the same kernel. Where seccomp
or Landlock are missing (macOS, other processors, kernels before 5.13) the audit hook stands alone: it is Python's,
code that means to gets round it, and it stops no reading of files. `Execution.protections` says what held. A program
can fill the disk with many small files in its folder, and code that wants to can forge the reply that it passed. For
models or prompts that you do not trust, run dsquant itself in a container or a virtual machine without a network.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from dsquant.errors import UsageError
from dsquant.evaluation import sandbox
from dsquant.evaluation.drift import Execution
from dsquant.evaluation.intervals import CONFIDENCE, Interval

Outcome = Literal["passed", "failed", "error", "time limit", "memory limit", "killed"]
# What a program can end with that lived to reply.
REPLIES = ("passed", "failed", "error", "memory limit")

CPU_SECONDS = 5
# Beside a busy machine a program gets less than a whole processor.
WALL_SECONDS = 20
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
REPLY_BYTES = 2**16
WORKERS = 4


@dataclass(frozen=True)
class Run:
    """What became of one program."""

    outcome: Outcome
    error: str
    """The exception's name; empty where none was raised."""
    protections: tuple[str, ...] = ()
    """What held it back; empty where it died before it could say."""


def run_program(program: str) -> Run:
    """Runs a program under limits; see the module for what they do not cover.

    Args:
        program: Python that raises where a test fails.

    Returns:
        What became of it.

    Raises:
        UsageError: where the platform has no limits (Windows).
    """
    if os.name != "posix":
        raise UsageError("--execute needs a POSIX system: there is nothing to limit a program's resources with here")
    limits = {"seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="dsquant-run-") as folder:
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
            request = json.dumps({"program": program, "reply_fd": writing, "limits": limits})
            try:
                process.communicate(request.encode(), timeout=WALL_SECONDS)
            except subprocess.TimeoutExpired:
                return Run("time limit", "")
            finally:
                _end(process)
        os.set_blocking(reading, False)
        return _outcome(process.returncode, _read(reading))
    finally:
        os.close(reading)
        os.close(writing)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a process and of those it may have started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _read(reading: int) -> bytes:
    try:
        return os.read(reading, REPLY_BYTES)
    except BlockingIOError:
        return b""


def _outcome(return_code: int, reply: bytes) -> Run:
    if return_code == -signal.SIGXCPU:
        return Run("time limit", "")
    found = _reply(reply)
    if found is None:
        return Run("killed", signal.Signals(-return_code).name if return_code < 0 else f"exit code {return_code}")
    return found


def _reply(reply: bytes) -> Run | None:
    """What the sandbox wrote; None for anything else, which the program may have written in its place."""
    try:
        found = json.loads(reply)
        outcome, error, protections = found["outcome"], found["error"], found["protections"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = [outcome, error, *protections] if isinstance(protections, list) else [None]
    if not all(isinstance(text, str) for text in texts) or outcome not in REPLIES:
        return None
    return Run(outcome, error, tuple(protections))


def run_all(programs: Sequence[str], safe_point: Callable[[int, int], None] = lambda done, total: None) -> list[Run]:
    """Runs programs, a few at a time.

    Args:
        programs: each as for `run_program`.
        safe_point: called after each with programs done and programs in all; it may raise to stop.

    Returns:
        What became of each.
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


def compare_runs(gold: Sequence[Run] | None, original: Sequence[Run], candidate: Sequence[Run]) -> Execution:
    """What the runs of two models' completions of the same tasks say.

    Args:
        gold: the runs of the tasks' own completions; None where there are none.
        original: the original's.
        candidate: the candidate's, task by task.

    Returns:
        pass@1 of each, the tasks that they do not share, and McNemar's test.
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
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided.

    Under the null hypothesis each task that one of two models alone passes is as likely to be the first's as the
    second's: a binomial distribution with p = 1/2.

    Args:
        only_first: tasks that the first alone passes.
        only_second: tasks that the second alone passes.

    Returns:
        The probability of a split at least as uneven, 0 to 1.
    """
    differing = only_first + only_second
    ways = tail = 1  # of choosing no task
    for count in range(1, min(only_first, only_second) + 1):
        ways = ways * (differing - count + 1) // count
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**differing)))


def wilson(passed: int, tasks: int, confidence: float = CONFIDENCE) -> Interval:
    """A proportion with Wilson's score interval (JASA 22, 1927).

    Args:
        passed: successes.
        tasks: trials, at least one.
        confidence: share of intervals that hold the truth, 0 to 1.

    Returns:
        The proportion and its interval.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = passed / tasks, z * z / tasks
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / tasks + weight / tasks / 4) / (1 + weight)
    low, high = middle - half if passed else 0.0, middle + half if passed < tasks else 1.0
    return Interval(share, low, high, tasks)


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """First proportion less the second of paired trials, with Newcombe's interval.

    Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: Wilson's intervals of the two proportions,
    combined with the correlation of the pairs.

    Args:
        both: trials in which both succeed.
        only_first: the first alone.
        only_second: the second alone.
        neither: none.

    Returns:
        The difference and its interval.
    """
    first, second, correlation = _margins(both, only_first, only_second, neither)

    def combined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    difference = first.estimate - second.estimate
    low = combined(first.estimate - first.low, second.high - second.estimate)
    high = combined(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, difference - low, difference + high, first.units)


def paired_ratio(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Second proportion as a share of the first of paired trials.

    Donner and Zou, Statistical Methods in Medical Research 21 (2012) 347-359 (MOVER-R): Wilson's intervals of the two
    proportions, combined with the correlation of the pairs.

    Args:
        both: trials in which both succeed.
        only_first: the first alone.
        only_second: the second alone.
        neither: none.

    Returns:
        The ratio and its interval; the first must succeed at least once.
    """
    below, above, correlation = _margins(both, only_first, only_second, neither)
    top, bottom = above.estimate, below.estimate

    def root(one: float, other: float) -> tuple[float, float]:
        """A limit of each proportion to the middle term, and the square root beside it."""
        middle = top * bottom - correlation * abs(top - one) * abs(other - bottom)
        return middle, math.sqrt(max(0.0, middle**2 - one * other * (2 * top - one) * (2 * bottom - other)))

    middle, distance = root(above.low, below.high)
    low = above.low * (2 * top - above.low) / (middle + distance) if above.low else 0.0
    middle, distance = root(above.high, below.low)
    high = (middle + distance) / (below.low * (2 * bottom - below.low))
    return Interval(top / bottom, max(0.0, low), high, below.units)


def _margins(both: int, only_first: int, only_second: int, neither: int) -> tuple[Interval, Interval, float]:
    """Both proportions, and their correlation with Newcombe's correction for continuity."""
    tasks = both + only_first + only_second + neither
    margins = (both + only_first, only_second + neither, both + only_second, only_first + neither)
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(0.0, product - tasks / 2)
    correlation = product / math.sqrt(math.prod(margins)) if all(margins) else 0.0
    return wilson(both + only_first, tasks), wilson(both + only_second, tasks), correlation
