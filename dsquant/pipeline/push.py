"""Pushes a finished output to the hub, where that has been found possible before the job began."""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsquant.errors import InputError, PackageError, UsageError
from dsquant.files.strict_json import read_json_object
from dsquant.jobs.folder_state import RECORD_FILE
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.packages import version
from dsquant.pipeline.result import Result
from dsquant.recipes import Recipe

# From this version on an interrupted `upload_folder` continues, and `auth_check` tells the right to write.
_HUB = 2


def run_and_push(recipe: Recipe, repository: str | None, run: Callable[[], Result], ranks: Ranks = ALONE) -> Result:
    """Runs a job, and pushes its output if a repository is named; raises what `check_push` does before it begins."""
    if repository is None:
        return run()
    ranks.once(lambda: check_push(repository, recipe.to))
    result = run()
    return replace(result, pushed_to=ranks.once(lambda: push(recipe.output, repository)))


def check_push(repository: str, formats: Sequence[str]) -> None:
    """Makes the repository of `--push-to`, private and empty, where it is not there.

    Raises UsageError where there are several formats or the name cannot be one, InputError where there is no token, it
    may not write there, or the hub does not answer, PackageError where huggingface_hub is too old.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", repository, re.ASCII):
        raise UsageError(f"--push-to {repository!r}: a repository is named by its owner and its name, as ORG/NAME")
    if len(formats) > 1:
        raise UsageError(f"--push-to {repository}: a repository holds one format, found {', '.join(formats)}")
    installed = version("huggingface_hub")
    if not installed.split(".")[0].isdigit() or int(installed.split(".")[0]) < _HUB:
        raise PackageError(f"--push-to needs huggingface_hub {_HUB} or newer, found {installed}; pip install -U it")
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise InputError(f"--push-to {repository}: there is no token; set HF_TOKEN, or log in by `hf auth login`")
    with _told(repository, "give a token that may write there, or another name"):
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().auth_check(repository, write=True)


def push(output: Path, repository: str) -> str:
    """Uploads the files that the record of a finished output names, and returns the address of the repository.

    Continues an upload that was interrupted: what the hub has is not sent again. Raises InputError where the hub
    refuses it.
    """
    from huggingface_hub import HfApi

    record = read_json_object(output / RECORD_FILE, finite=False)
    names = sorted({*record["files"], RECORD_FILE})
    with _told(repository, "the output is finished; repeat the command with --resume to go on"):
        commit: Any = HfApi().upload_folder(
            repo_id=repository,
            folder_path=output,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=f"Quantized by dsquant {record['versions']['dsquant']}",
        )
    return str(commit.repo_url)


@contextmanager
def _told(repository: str, then: str) -> Iterator[None]:
    """Turns what the hub and the network say into an InputError."""
    try:
        yield
    except Exception as error:  # httpx and huggingface_hub raise of many kinds
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"--push-to {repository}: the hub did not take it: {reason}; {then}") from error
