"""Plans the measurement of code drift: which prompts, and whether the models fit in memory."""

from collections.abc import Iterable
from pathlib import Path

import torch

from dsquant.calibration.documents import FOLDERS
from dsquant.calibration.tokenizer import encode
from dsquant.errors import InputError, UsageError
from dsquant.escaping import counted
from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.code.generation import resident_size
from dsquant.evaluation.code.tasks import DriftPlan, Task, read_tasks
from dsquant.evaluation.opening import Original
from dsquant.evaluation.request import DriftRequest
from dsquant.options import format_size
from dsquant.source.vocabulary import check_embedded, surplus_tokens

SHIPPED_PROMPTS = "python"
NO_PROMPTS = "none"
# Usable share of a GPU's free memory: the cache and the activations need the rest.
FREE_SHARE = 0.8


def plan_drift(request: DriftRequest, original: Original, memory_bytes: int) -> DriftPlan | None:
    """Reads the prompts and decides how code drift is measured, before anything runs; None where it is not measured.

    `memory_bytes` may be taken by a model's weights. Raises UsageError where code is to be run without consent or
    without prompts that have tests, InputError (with the line's number) where a file of prompts cannot be used.
    """
    if request.execute and not request.allow_code_execution:
        raise UsageError(
            "--execute runs code that a language model wrote on this machine, in a process with limits that are not "
            "a security boundary; add --allow-code-execution if you mean it"
        )
    if request.allow_code_execution and not request.execute:
        raise UsageError("--allow-code-execution does nothing without --execute")
    if request.prompts == NO_PROMPTS:
        if request.execute:
            raise UsageError("--execute needs prompts to complete; leave out --prompts none")
        return None
    problem = too_large(original, memory_bytes)
    if problem and request.execute:
        raise UsageError(f"--execute needs generated code, and {problem}")
    if problem and request.prompts is None:
        return None
    tasks = tuple(read_tasks(_prompts_file(request.prompts or SHIPPED_PROMPTS)))
    if request.execute and not any(task.test for task in tasks):
        raise InputError(f"{request.prompts}: no prompt has a test to run (key `test`), which --execute needs")
    _check_tokens(tasks, request, original)
    return DriftPlan(tasks, request.max_tokens, execute=request.execute, too_large=problem)


def too_large(original: Original, memory_bytes: int) -> str | None:
    """Returns why a model cannot generate in so much memory, in words; None where it can."""
    needed, device = resident_size(original.skeleton), original.checkpoint.weights.device
    left, where = max(0, memory_bytes), "the memory budget"
    if device.type == "cuda":
        free = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
        left, where = (free, "the GPU") if free < left else (left, where)
    if needed <= left:
        return None
    return f"a model takes {format_size(needed)} in float32, more than the {format_size(left)} that are left in {where}"


def drift_caveats(plan: DriftPlan | None) -> list[str]:
    """Returns what the plan's code drift does not show: sentences without a full stop."""
    if plan is None:
        return ["no code was generated; choose prompts with --prompts, also for models that do not fit in memory"]
    if plan.too_large is not None:
        return [f"no code was generated, {plan.too_large}; both models read the prompts' own completions instead"]
    prompts, tokens = counted(len(plan.tasks), "prompt"), counted(plan.max_tokens, "token")
    return [f"code drift rests on {prompts} and greedy completions of at most {tokens}"]


def left_over_caveats(drifts: Iterable[CodeDrift]) -> list[str]:
    """Returns a sentence about folders of programs that dsquant could not remove, or nothing."""
    found = dict.fromkeys(folder for one in drifts if one.execution for folder in one.execution.left_over)
    return [f"programs left what could not be removed: {', '.join(found)}; remove it yourself"] if found else []


def _prompts_file(prompts: str) -> Path:
    path = Path(prompts).expanduser()
    if path.is_file():
        return path
    if prompts == SHIPPED_PROMPTS:
        shipped = (folder / "held-out" / "prompts" / f"{SHIPPED_PROMPTS}.jsonl" for folder in FOLDERS)
        return next(file for file in shipped if file.is_file())
    raise InputError(f"--prompts {prompts!r}: no such file; name one, or {SHIPPED_PROMPTS} for the shipped prompts")


def _check_tokens(tasks: tuple[Task, ...], request: DriftRequest, original: Original) -> None:
    """Refuses prompts that do not fit into the model's context, or have tokens that the model does not know."""
    for task in tasks if surplus_tokens(original.tokenizer) else ():
        samples = [original.tokenizer.encode(text) for text in (task.prompt, task.gold) if text]
        check_embedded(samples, original.tokenizer, f"prompt {task.name}")
    longest = max(tasks, key=lambda task: len(task.prompt))
    context = original.skeleton.config.get("max_position_embeddings")
    wanted = len(encode(longest.prompt, original.tokenizer)) + request.max_tokens
    if context is not None and wanted > int(context):
        raise UsageError(
            f"prompt {longest.name} and {request.max_tokens} tokens after it are {wanted} tokens; the model's context "
            f"is {context}; lower --max-tokens or shorten the prompt"
        )
