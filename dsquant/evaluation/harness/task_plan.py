"""Reads tasks of lm-evaluation-harness and builds their requests, before any model runs."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from dsquant.errors import DsquantError, InputError, PackageError, UsageError
from dsquant.evaluation.code.drift_plan import too_large
from dsquant.evaluation.opening import Original
from dsquant.evaluation.request import EvaluationRequest
from dsquant.packages import load, version
from dsquant.source.vocabulary import check_embedded, surplus_tokens

REQUIREMENT = '"dsquant[tasks]"'
# As the harness' own command seeds what tasks draw: Python's generator, the others, and few-shot examples.
PYTHON_SEED, OTHER_SEED = 0, 1234
# Where a model does not name its context, as in the harness.
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class PlannedTask:
    """A task of the harness with its requests."""

    task: Any
    """The harness' own, an `lm_eval.api.task.Task`."""
    documents: int
    documents_in_all: int
    samples: bool
    """Whether it asks for sampled answers."""


@dataclass(frozen=True)
class TaskPlan:
    """What models are asked in their tasks."""

    tasks: Mapping[str, PlannedTask]
    groups: Mapping[str, Any]
    """Those that have a value of their own, as `lm_eval.api.group.Group`."""
    context: int
    """The most tokens that the models read."""

    @property
    def names(self) -> tuple[str, ...]:
        """Groups and tasks that are scored."""
        return (*self.groups, *self.tasks)


def plan_tasks(request: EvaluationRequest, original: Original, memory_bytes: int) -> TaskPlan | None:
    """Reads the tasks; None where none are asked for. `memory_bytes` may be taken by a model's weights.

    Raises PackageError where the harness is not installed, UsageError where a task is unknown, runs code that models
    write, or the models do not fit in memory, InputError where a task or its dataset cannot be read.
    """
    if not request.tasks:
        return None
    tasks = load("lm_eval", "lm_eval.tasks", REQUIREMENT)
    problem = too_large(original, memory_bytes)
    if problem is not None:
        raise UsageError(f"--tasks needs models in memory, and {problem}; raise --memory-budget, or leave --tasks out")
    named = [name for name in request.tasks if not _is_file(name)]
    for name in request.tasks:
        if _is_file(name):
            _check_file(name)
    with quietly(), _seeded():
        # The harness' own 14,000 files take 20 seconds to read.
        manager = tasks.TaskManager(include_defaults=bool(named))
        for name in named:
            _check_name(name, manager)
        loaded, groups = _loaded(request.tasks, manager)
        context = int(original.skeleton.config.get("max_position_embeddings") or DEFAULT_CONTEXT)
        planned = {
            name: _planned(name, task, request.task_samples, context, original.tokenizer)
            for name, task in loaded.items()
        }
    return TaskPlan(planned, {name: group for name, group in groups.items() if group.has_aggregation}, context)


def task_caveats(plan: TaskPlan | None) -> list[str]:
    """Returns what the plan's scores do not show: sentences without a full stop."""
    if plan is None:
        return []
    first = (
        f"scores of tasks (lm-evaluation-harness {version('lm_eval')}) are of greedy answers in float32, with the "
        "few-shot examples that each task names and without a chat template: compare candidates with the original; "
        "published scores often rest on other prompts"
    )
    words = [first]
    few = [name for name, one in plan.tasks.items() if one.documents < one.documents_in_all]
    if few:
        words.append(f"only the first documents were asked: {_listed(few, plan)}")
    sampled = [name for name, one in plan.tasks.items() if one.samples]
    if sampled:
        words.append(f"tasks that ask for sampled answers got one greedy answer: {', '.join(sampled)}")
    return words


def _listed(names: list[str], plan: TaskPlan) -> str:
    told = [f"{name} {plan.tasks[name].documents} of {plan.tasks[name].documents_in_all}" for name in names[:8]]
    return ", ".join(told) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps the harness' progress bars and messages from the terminal, and from what `--json` prints."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds the generators that tasks draw from; afterwards they go on as before."""
    before = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _check_file(name: str) -> None:
    if not _path(name).is_file():
        raise InputError(f"--tasks {name!r}: no such file")
    if any(line.startswith("group:") for line in _path(name).read_text(errors="replace").splitlines()):
        raise UsageError(f"--tasks {name!r}: it holds a group; name the files of its tasks")


def _check_name(name: str, manager: Any) -> None:
    """Refuses what is no task, and tasks that are known to run code that models write."""
    if name not in manager.task_index:
        near = get_close_matches(name, manager.all_tasks, n=3)
        words = f"did you mean {', '.join(near)}?" if near else "the harness names its tasks with `lm-eval ls tasks`"
        raise UsageError(f"--tasks {name!r}: lm-evaluation-harness {version('lm_eval')} knows no such task; {words}")
    for member, config in _configs(name, manager.task_index):
        if config.get("unsafe_code"):
            raise _unsafe(member)


def _unsafe(name: str) -> UsageError:
    return UsageError(
        f"task {name} runs code that a model writes, which --tasks does not do; for code, use --prompts with --execute"
    )


def _configs(name: str, index: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the tasks that a name of the harness' index stands for, with their configurations."""
    entry = index.get(name)
    if entry is None:
        return
    listed = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
    if not isinstance(listed, list):
        yield name, entry.cfg
        return
    for member in _members(listed):
        yield from _configs(member, index)


def _members(listed: list[Any]) -> Iterator[str]:
    """Yields the names in a group's list, whose entries may be mappings with lists of their own."""
    for item in listed:
        named = item.get("task", item.get("group")) if isinstance(item, dict) else item
        yield from _members(named) if isinstance(named, list) else (str(named),)


def _loaded(names: tuple[str, ...], manager: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads tasks with their datasets; returns name -> task, name -> group."""
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        with _blaming(name):
            found = manager.load([str(_path(name)) if _is_file(name) else name])
        twice = tasks.keys() & found["tasks"].keys()
        if twice:
            raise UsageError(f"--tasks {name!r}: the task {min(twice)} is there already; name each task once")
        tasks |= found["tasks"]
        groups |= found["groups"]
    return tasks, groups


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Has whatever a task raises name the task: its configuration may be anybody's, and its dataset anywhere."""
    try:
        yield
    except DsquantError:
        raise
    except ModuleNotFoundError as error:
        raise PackageError(f"task {name} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"task {name}: its configuration or dataset cannot be read ({type(error).__name__}: {reason:.300}); "
            "check the names and paths in it, and the network"
        ) from error


def _planned(name: str, task: Any, most: int | None, context: int, tokenizer: Any) -> PlannedTask:
    """Builds a task's requests and checks that models can answer them."""
    from dsquant.evaluation.harness.harness_model import generation_limits

    if getattr(task, "UNSAFE_CODE", False):
        raise _unsafe(name)
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name} shows images or plays sounds, which these models do not read")
    with _blaming(name):
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
        task.build_all_requests(limit=most)
        in_all = len(task.eval_docs)
    samples = False
    for request in task.instances:
        if request.request_type == "generate_until":
            _, tokens, sampled = generation_limits(request.args[1])
            samples |= sampled or request.repeats > 1
            if tokens >= context:
                raise UsageError(f"task {name} asks for answers of {tokens} tokens; the model's context is {context}")
        elif request.args[-1] == "":
            raise InputError(f"task {name}: document {request.doc_id} has an empty text to predict")
        if surplus_tokens(tokenizer):
            texts = [text for text in request.args if isinstance(text, str)]
            check_embedded(map(tokenizer.encode, texts), tokenizer, f"task {name}, document {request.doc_id}")
    return PlannedTask(task, len({request.doc_id for request in task.instances}), in_all, samples)
