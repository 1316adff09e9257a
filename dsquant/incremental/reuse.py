"""Creates a second file with the same content without copying its bytes, where the disk can do that."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from dsquant.files.disk import PARTIAL, copy_file

# ioctl of Linux: the new file shares the old one's blocks until one of them is written to (btrfs, XFS).
FICLONE = 0x40049409


def reuse_file(old: Path, new: Path) -> str:
    """Creates or replaces `new` with the content of `old`: by reflink, else hard link, else copy; returns which.

    A reflink is better than a hard link: changing one file in place does not change the other.
    """
    partial = new.with_name(new.name + PARTIAL)
    partial.unlink(missing_ok=True)
    how = "reflink" if _reflink(old, partial) else "hard link" if _link(old, partial) else "copy"
    if how == "copy":
        copy_file(old, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    partial.replace(new)
    partial.unlink(missing_ok=True)  # a rename from one name of a file to another name of it does nothing
    return how


def _reflink(old: Path, new: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    with old.open("rb") as source, new.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        except OSError:
            new.unlink()
            return False
    return True


def _link(old: Path, new: Path) -> bool:
    try:
        os.link(old.resolve(), new)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        return False
    return True


def ways_of(reused: Mapping[str, int]) -> str:
    """Returns `3 by reflink, 1 by copy` for the number of files by the way they were reused."""
    return ", ".join(f"{count} by {way}" for way, count in reused.items()) or "none"
