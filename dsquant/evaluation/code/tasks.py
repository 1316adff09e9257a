"""Reads files of prompts: dsquant's own, HumanEval's and MBPP's, one JSON object a line.

| format | keys |
|---|---|
| dsquant | `prompt`; optional `completion` (gold), `test` (a program to run after both), `stop` (strings), `id` |
| HumanEval | `task_id`, `prompt`, `canonical_solution`, `test`, `entry_point` |
| MBPP | `task_id`, `text`, `code`, `test_list`, `test_setup_code`; sanitized: `prompt` for `text`, `test_imports` |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.escaping import counted
from dsquant.evaluation.code.python_tokens import normalized
from dsquant.files.foreign import read_file
from dsquant.files.strict_json import parse_json

# Beginnings of lines after the function that a prompt began, as in HumanEval's paper (arXiv 2107.03374).
BODY_STOPS = ("\ndef ", "\nclass ", "\n@", "\n#", "\nif ", "\nfor ", "\nprint(", "\nimport ", "\nfrom ", "\nassert ")
# What follows a complete program.
PROGRAM_STOPS = ("\nassert ", "\nprint(", "\nif __name__", '\n"""')
FORMATS = "`prompt` (and maybe `completion`), or HumanEval's or MBPP's keys"


@dataclass(frozen=True)
class Task:
    """A prompt, and what its completion is compared with."""

    name: str
    prompt: str
    gold: str | None
    """The completion that its author wrote."""
    stops: tuple[str, ...]
    """Strings that end a completion and are not part of it."""
    test: str | None
    """A program to run after the completed prompt; it raises where the completion is wrong."""
    prompt_is_code: bool = True
    """Whether the completion continues the prompt's code; otherwise it is a program of its own."""

    @property
    def prefix(self) -> str:
        """The code that a completion continues."""
        return self.prompt if self.prompt_is_code else ""

    def program(self, completion: str) -> str:
        """Returns code that runs the test on a completion."""
        return f"{self.prefix}{completion}\n\n{self.test or ''}\n"


@dataclass(frozen=True)
class DriftPlan:
    """Prompts and limits of a measurement of code drift."""

    tasks: tuple[Task, ...]
    max_tokens: int = 64
    """Largest number of tokens of a completion."""
    batch_prompts: int = 24
    """Prompts that are completed together. Another number may change a completion: sums in another order differ in
    their last bits, and where two tokens are nearly equally likely the other one may win."""
    execute: bool = False
    """Whether the completions are run with the tasks' tests; `execution` says what that means."""
    too_large: str | None = None
    """Why nothing is generated, in words; None where the models fit in memory."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures that gates can be set on."""
        if self.too_large is not None:
            return ("greedy_agreement",)
        names = ["code_exact_match", "parse_rate_drop", "loop_rate_rise"]
        if all(task.gold is not None for task in self.tasks):
            names += ["code_bleu_drop", "codebleu_drop"]
        if self.execute:
            names += ["pass_rate_drop", "accuracy_retained"]
        return tuple(names)

    @property
    def noise_batch_prompts(self) -> int:
        """The other batch size, for the noise floor."""
        return max(1, self.batch_prompts // 3)

    @property
    def note(self) -> str:
        """How the numbers are measured, in one sentence."""
        if self.too_large is not None:
            return (
                f"nothing was generated: {self.too_large}. Both models read the prompts with their own completions; "
                "agreement is the share of places where the candidate ranks the original's greedy token first"
            )
        tokens, prompts = counted(self.max_tokens, "token"), counted(self.batch_prompts, "prompt")
        return f"greedy, at most {tokens}, {prompts} together; noise floor: {self.noise_batch_prompts} together"


def read_tasks(path: Path) -> list[Task]:
    """Reads a file of prompts, in the file's order. Raises InputError where it cannot be read, is empty, or a line is
    broken (its number is in the message)."""
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the file of prompts cannot be read: {error}") from error
    tasks = [_task(line, f"{path}, line {number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise InputError(f"{path}: the file holds no prompt; expected one JSON object a line with {FORMATS}")
    return tasks


def _task(line: str, where: str, number: int) -> Task:
    record = parse_json(line, where, "each line must be one whole object")
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with {FORMATS}, found {type(record).__name__}")
    if "canonical_solution" in record or "entry_point" in record:
        return _human_eval(record, where)
    if "test_list" in record or "code" in record:
        return _mbpp(record, where)
    return _own(record, where, number)


def _own(record: Mapping[str, Any], where: str, number: int) -> Task:
    stops = record.get("stop", list(BODY_STOPS))
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"{where}: `stop` must be a list of strings that are not empty, found {stops!r}")
    return Task(
        name=str(record.get("id", number)),
        prompt=_text(record, "prompt", where),
        gold=_text(record, "completion", where) if record.get("completion") is not None else None,
        stops=tuple(stops),
        test=_text(record, "test", where) if record.get("test") is not None else None,
    )


def _human_eval(record: Mapping[str, Any], where: str) -> Task:
    return Task(
        name=str(record.get("task_id", where)),
        prompt=_text(record, "prompt", where),
        gold=_text(record, "canonical_solution", where),
        stops=BODY_STOPS,
        test=f"{_text(record, 'test', where)}\n\ncheck({_text(record, 'entry_point', where)})",
    )


def _mbpp(record: Mapping[str, Any], where: str) -> Task:
    tests, imports = _texts(record, "test_list", where), []
    if "test_imports" in record:
        imports = _texts(record, "test_imports", where)
    setup = normalized(str(record.get("test_setup_code") or ""))
    question = _text(record, "text" if "text" in record else "prompt", where)
    if not tests:
        raise InputError(f"{where}: `test_list` is empty; a task of MBPP has tests")
    # The tests give the function's name, as in the paper's prompt (arXiv 2108.07732, section 3).
    prompt = '"""\n' + "\n".join([question.strip(), *tests]) + '\n"""\n'
    code, test = _text(record, "code", where), "\n".join([*imports, setup, *tests])
    return Task(str(record.get("task_id", where)), prompt, code, PROGRAM_STOPS, test, prompt_is_code=False)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else repr(value)
        raise InputError(f"{where}: `{key}` must be text that is not empty, found {found}; expected {FORMATS}")
    return normalized(value)


def _texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    values = record.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: `{key}` must be a list of texts, found {values!r}")
    return [normalized(value) for value in values]
