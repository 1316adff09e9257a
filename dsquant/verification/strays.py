"""Finds what may not lie in a finished output: only its record's files, and the folders on their way, belong there.

A file may be a link to a file inside the output, or into the hub's cache of which the output is a snapshot. What git,
the hub's client and killed runs leave is reported and not judged, since no engine reads it; there, too, only files and
folders may lie. Links to anywhere else are never followed.
"""

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dsquant.files.foreign import KINDS
from dsquant.jobs.folder_state import REMOVED_FOLDER, WORK_FOLDER

# Kept by git, by the hub's client in its downloads, and left by killed runs for the next one to remove.
KEPT_BY_OTHERS = tuple(
    PurePosixPath(name)
    for name in (".git", ".gitattributes", ".gitignore", ".cache/huggingface", WORK_FOLDER, REMOVED_FOLDER)
)
NOT_PART = "not part of the output"


@dataclass
class Listing:
    """The content of a folder that no record lists."""

    strays: dict[PurePosixPath, str] = field(default_factory=dict)
    """Path -> problem."""
    kept_by_others: dict[PurePosixPath, list[int]] = field(default_factory=dict)
    """Folder or file of git or the hub's client -> the sizes of its files."""


def printable(path: PurePosixPath | str) -> str:
    """Returns a path as a terminal can show it, whichever bytes its name has."""
    name = os.fsencode(str(path)).decode(errors="backslashreplace")
    return name if name.isprintable() else repr(name)[1:-1]


def list_strays(folder: Path, names: Collection[str], checked: Collection[str] = ()) -> Listing:
    """Lists what lies in a folder besides the files in `names`, and outside the folders in `checked`."""
    found = Listing()
    for path, kind, num_bytes in _entries(folder, {PurePosixPath(name) for name in checked}):
        home = next((other for other in KEPT_BY_OTHERS if path.is_relative_to(other)), None)
        if str(path) in names:
            continue
        if home is not None and kind in ("a file", "an empty folder"):
            found.kept_by_others.setdefault(home, []).extend([num_bytes] if kind == "a file" else [])
        else:
            found.strays[path] = NOT_PART if kind == "a file" else f"{kind}, {NOT_PART}"
    return found


def _entries(folder: Path, checked: Collection[PurePosixPath]) -> Iterator[tuple[PurePosixPath, str, int]]:
    """Yields everything below a folder that is not itself a non-empty folder: path, kind and bytes."""
    waiting = [PurePosixPath()]
    while waiting:
        inside = waiting.pop()
        if inside in checked:
            continue
        try:
            entries = sorted(os.scandir(folder / inside), key=lambda entry: entry.name)
        except OSError as error:  # no right to look, or a path that is too long
            yield inside, f"a folder that cannot be looked into ({error.strerror})", 0
            continue
        if not entries and inside.parts:
            yield inside, "an empty folder", 0
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(inside / entry.name)
            else:
                status = entry.stat(follow_symlinks=False)
                yield inside / entry.name, KINDS.get(stat.S_IFMT(status.st_mode), "a file"), status.st_size


def what_is_wrong(folder: Path, name: str) -> str | None:
    """Returns why a recorded file cannot be read as part of its output; None for a regular file or a link to one."""
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a link that leads to itself, and a null byte in the folder's name
        return "missing" if not (folder / name).is_symlink() else "a link that leads nowhere"
    root = folder.resolve()
    if not any(path.is_relative_to(home) for home in (root, *_blobs(root))):
        return f"a link that leads out of the output, to {printable(str(path))}"
    kind = KINDS.get(stat.S_IFMT(path.stat().st_mode), "a file")
    return None if kind == "a file" else f"{kind} instead of a file"


def _blobs(root: Path) -> Iterator[Path]:
    """Yields the folder of a snapshot's content in the hub's cache: MODEL/blobs for MODEL/snapshots/COMMIT."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            yield folder.parent.parent / "blobs"
            return
