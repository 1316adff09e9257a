"""Files of prompts: three formats, and every kind of broken line with its number."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsquant.errors import InputError
from dsquant.evaluation.code.drift_plan import SHIPPED_PROMPTS, _prompts_file
from dsquant.evaluation.code.execution import run_all
from dsquant.evaluation.code.tasks import read_tasks

# As in the published file: blank lines and imports in front, metadata before the checks, a test that calls a helper.
HUMAN_EVAL = {
    "task_id": "HumanEval/x",
    "prompt": '\n\nfrom typing import List\n\n\ndef double(x: int) -> List[int]:\n    """ Twice x.\n    >>> double(1)\n'
    '    [2]\n    """\n',
    "canonical_solution": "    return [2 * x]\n",
    "test": "\n\nMETADATA = {\n    'author': 'x',\n    'dataset': 'test'\n}\n\n\ndef check(candidate):\n"
    "    assert candidate(3) == [6]\n    assert double(0) == [0]\n\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_list": ["assert double(3) == 6", "assert double(limit) == 20"],
    "test_setup_code": "limit = 10",
    "challenge_test_list": [],
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def test_each_formats_gold_passes_its_own_test(tmp_path: Path) -> None:
    own = {"prompt": "def double(x):\n", "completion": "    return 2 * x\n", "test": "assert double(2) == 4"}
    sanitized = {key: value for key, value in MBPP.items() if key not in ("text", "test_setup_code")}
    sanitized |= {"prompt": MBPP["text"], "test_imports": ["limit = 10"]}
    tasks = read_tasks(lines(tmp_path / "a.jsonl", own, HUMAN_EVAL, MBPP, sanitized))
    assert [task.name for task in tasks] == ["1", "HumanEval/x", "11", "11"]
    assert [task.prompt_is_code for task in tasks] == [True, True, False, False]
    assert {run.outcome for run in run_all([task.program(task.gold or "") for task in tasks])} == {"passed"}
    assert all(run.outcome != "passed" for run in run_all([task.program("    return 3\n") for task in tasks]))


def test_every_shipped_prompt_has_a_completion_that_passes_its_test() -> None:
    tasks = read_tasks(_prompts_file(SHIPPED_PROMPTS))
    assert len(tasks) == 24 and len({task.name for task in tasks}) == 24
    runs = run_all([task.program(task.gold or "") for task in tasks])
    assert [task.name for task, run in zip(tasks, runs, strict=True) if run.outcome != "passed"] == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('{"prompt": "x"', "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"prompt": 3}', "`prompt` must be text"),
        ('{"prompt": " "}', "not empty"),
        ('{"completion": "x"}', "`prompt` must be text"),
        ('{"prompt": "x", "stop": "y"}', "`stop` must be a list"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "x", "id": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        (json.dumps({**HUMAN_EVAL, "test": None}), "`test` must be text"),
        (json.dumps({**MBPP, "test_list": []}), "`test_list` is empty"),
        (json.dumps({**MBPP, "test_list": [1]}), "`test_list` must be a list of texts"),
        (json.dumps({**MBPP, "code": ""}), "`code` must be text"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, broken: str, words: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "x"}, "", broken)
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: ") as error:
        read_tasks(path)
    assert words in str(error.value)


def test_a_file_without_prompts_or_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompt"):
        read_tasks(lines(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "binary.jsonl")
    with pytest.raises(InputError, match="no such file; name one, or python for"):
        _prompts_file("nowhere.jsonl")


SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("file", "count", "some"),
    [
        pytest.param("mbpp.jsonl", 974, slice(10, 34)),
        pytest.param("mbpp.jsonl", 974, slice(None), marks=pytest.mark.slow),
        pytest.param("HumanEval.jsonl", 164, slice(None), marks=pytest.mark.slow),
    ],
)
def test_the_published_tasks_are_read_and_their_solutions_pass(file: str, count: int, some: slice) -> None:
    if not (SHARED_DATA / file).is_file():
        pytest.skip(f"{file} is not among the shared data of this machine")
    tasks = read_tasks(SHARED_DATA / file)
    assert len(tasks) == count and not any(stop in (task.gold or "") for task in tasks for stop in task.stops)
    runs = run_all([task.program(task.gold or "") for task in tasks[some]])
    assert [task.name for task, run in zip(tasks[some], runs, strict=True) if run.outcome != "passed"] == []
