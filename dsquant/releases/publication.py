"""Puts a finished folder in its public place by one rename: readers see the old result or the new one, never a mixture.

`rename`: OUTPUT is the result. An older one is exchanged with it in one step (Linux `renameat2`), then removed.
`symlink`: results lie in OUTPUT/releases; the link OUTPUT/current is replaced in one step. Older ones stay.
"""

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dsquant.errors import InputError
from dsquant.files.disk import sync_folder
from dsquant.files.foreign import read_file
from dsquant.files.sealing import RELEASE_FILE, broken_sections
from dsquant.jobs.folder_state import check_name
from dsquant.releases.recipe import ReleaseRecipe

# The layout of release.json. 1: first. 2: sealed like an output's record, with hashes of files in no such record.
RELEASE_VERSION = 2
CURRENT = "current"
RELEASES = "releases"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def published_folder(recipe: ReleaseRecipe) -> Path:
    """Returns where readers look."""
    return recipe.output if recipe.publish == "rename" else recipe.output / CURRENT


def published_release(recipe: ReleaseRecipe) -> dict[str, Any] | None:
    """Returns the record of the published release; None without one."""
    return read_release(published_folder(recipe))


def read_release(folder: Path) -> dict[str, Any] | None:
    """Reads the record of a finished result; None where the folder holds none, or a damaged one."""
    try:
        raw = read_file(folder / RELEASE_FILE)
        record = json.loads(raw)
    except (InputError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return record if record.get("release_version") == 1 or not broken_sections(raw) else None


def check_publishable(recipe: ReleaseRecipe) -> None:
    """Refuses an output folder with anything but published runs in it, with InputError, before hours are spent."""
    check_name(Path(os.path.realpath(recipe.output)))  # a link may lead to a folder that is still to be made
    output = recipe.output.resolve()
    if output.exists() and output.stat().st_dev != output.parent.stat().st_dev:
        raise InputError(f"{output} is a mount point, and results are renamed into place; name a folder in it")
    if not output.exists() or not any(output.iterdir()):
        return
    if recipe.publish == "rename" and read_release(output) is None:
        raise InputError(
            f"{output} is not empty and no result of `dsquant run` (publish: rename); name another folder, or empty it"
        )
    if recipe.publish == "symlink" and not (output / RELEASES).is_dir():
        raise InputError(
            f"{output} is not empty and holds no {RELEASES}/ of `dsquant run` (publish: symlink); name another folder"
        )


def is_complete(recipe: ReleaseRecipe, key: str) -> bool:
    """Returns whether a result already lies among the releases that a link can point to."""
    found = read_release(recipe.output / RELEASES / key[:16]) if recipe.publish == "symlink" else None
    return found is not None and found.get("key") == key


def publish(recipe: ReleaseRecipe, build: Path | None, key: str) -> None:
    """Publishes a finished folder, which must be on the same file system and is gone afterwards.

    `build` is None where `is_complete`; `key` names the result in `releases`. Raises InputError where an older result
    cannot be exchanged in one step here.
    """
    output = recipe.output.resolve()
    if recipe.publish == "symlink":
        _switch_link(output, build, key)
        return
    assert build is not None
    if output.exists() and any(output.iterdir()):
        _exchange(build, output)
        sync_folder(output.parent)
        shutil.rmtree(build)
    else:
        build.rename(output)  # replaces an empty folder
        sync_folder(output.parent)


def _switch_link(output: Path, build: Path | None, key: str) -> None:
    releases = output / RELEASES
    releases.mkdir(parents=True, exist_ok=True)
    name = key[:16]
    if build is not None:
        if (releases / name).exists():
            shutil.rmtree(releases / name)
        build.rename(releases / name)
        sync_folder(releases)
    link = output / f".{CURRENT}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(RELEASES, name))
    link.replace(output / CURRENT)
    sync_folder(output)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders in one step."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed: int | None = None
    if hasattr(libc, "renameat2"):
        names = os.fsencode(one), os.fsencode(other)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        failed = ctypes.get_errno()
    if failed not in (None, errno.ENOSYS, errno.EINVAL):
        raise OSError(failed, os.strerror(failed), str(other))
    raise InputError(
        f"{other} holds an older result, and this system cannot exchange two folders in one step; the new one is "
        f"complete in {one}: move the old one away and run again, or use publish: symlink"
    )
