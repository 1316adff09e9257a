"""What hostile programs reach: nothing outside, no pass that they did not earn, and no error of ours."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsquant.evaluation.code import execution, sandbox
from dsquant.evaluation.code.execution import run_program
from dsquant.evaluation.code.scratch import remove_tree
from dsquant.evaluation.code.system_calls import CALLS, allowing_filter
from tests.support import hostile_programs as hostile

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86-64's")
PROGRAMS = {**hostile.FILES, **hostile.PROCESSES, **hostile.NETWORK, **hostile.REPLIES}
# One of each kind; the others are slow together.
QUICK = (
    "chmod by descriptor",
    "setxattr",
    "own immutable file",
    "remove by descriptor",
    "hard link to an outside file",
    "shared memory that stays",
    "fork in C",
    "clock",
    "abstract socket",
    "exit after closing everything",
    "json replaced",
    "checker replaced",
)


def state_of(folder: Path) -> list[object]:
    """Everything that a program could change of a folder but its times of reading."""
    found: list[object] = []
    for path in sorted([folder, *folder.rglob("*")]):
        stat = path.lstat()
        found += [str(path), stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink, stat.st_mtime_ns, stat.st_ctime_ns]
        if path.is_file():
            found += [path.read_text(), [(name, os.getxattr(path, name)) for name in os.listxattr(path)]]
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "outside"
    (folder / "below").mkdir(parents=True)
    (folder / "canary").write_text("sings")
    os.setxattr(folder / "canary", "user.canary", b"sings")
    before = state_of(folder)
    yield folder
    assert state_of(folder) == before
    assert not list(Path("/dev/shm").glob("*dsquant-canary*"))


def attack(name: str, program: str, outside: Path) -> None:
    run = run_program("import os, sys\n" + program.format(outside=outside))
    assert run.outcome != "passed", name
    assert run.left_over == "" and len(run.protections) == 5


@LINUX
@pytest.mark.parametrize("name", QUICK)
def test_a_hostile_program_changes_nothing_and_does_not_pass(name: str, outside: Path) -> None:
    attack(name, PROGRAMS[name], outside)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in QUICK])
def test_more_hostile_programs_change_nothing_and_do_not_pass(name: str, outside: Path) -> None:
    attack(name, PROGRAMS[name], outside)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", hostile.SLOW)
def test_programs_that_will_not_end_are_ended(name: str, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CPU_SECONDS", 1)
    monkeypatch.setattr(execution, "WALL_SECONDS", 4)
    attack(name, hostile.SLOW[name], outside)


RAW = """
import ctypes, errno, json, os, sys
sys.path.insert(0, sys.argv[2])
import sandbox
request = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)
protections = [sandbox.take_own_file_system(os.getcwd(), 2**20)] if sys.argv[1] == "mounts" else []
protections += [sandbox.give_up_rights(os.getcwd()), sandbox.close_files(os.getcwd())]
protections += [sandbox.close_calls(bytes.fromhex(request["filter"]))]
found = {}
for name, (number, *arguments) in request["calls"].items():
    values = [a.encode() if isinstance(a, str) else a if a is None else ctypes.c_long(a) for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *values)
    found[name] = errno.errorcode[ctypes.get_errno()] if result == -1 else "done"
os.write(1, json.dumps([protections, found]).encode())
os._exit(0)
"""


def raw_calls(outside: Path, mounts: str) -> tuple[list[str], dict[str, str]]:
    """Calls the kernel as C code could that got round Python's audit hook."""
    calls = {
        name: [one.decode("latin-1").format(outside=outside) if isinstance(one, bytes) else one for one in call]
        for name, call in hostile.RAW_CALLS.items()
    }
    request = {"filter": allowing_filter(platform.machine()).hex(), "calls": calls}
    (outside.parent / "own").mkdir()
    command = [sys.executable, "-c", RAW, mounts, str(Path(sandbox.__file__).parent)]
    done = subprocess.run(
        command, input=json.dumps(request), cwd=outside.parent / "own", capture_output=True, text=True, check=True
    )
    protections, found = json.loads(done.stdout)
    return protections, found


@LINUX
@X86
@pytest.mark.parametrize("mounts", ["mounts", "none"])
def test_no_call_that_is_off_the_list_gets_to_the_kernel(mounts: str, outside: Path) -> None:
    protections, found = raw_calls(outside, mounts)
    if "seccomp" not in protections[-1] or "audit hook" in protections[-1]:
        pytest.skip("this kernel has no seccomp")
    assert len(found) >= 60 and set(found.values()) == {"EPERM"}


def test_no_call_changes_what_a_program_could_not_open() -> None:
    """By name: paths are what the filter cannot see, so calls that take one must be Landlock's to guard."""
    words = (
        "chmod",
        "chown",
        "utime",
        "xattr",
        "mknod",
        "mount",
        "sock",
        "sched_set",
        "set_time",
        "clock_set",
        "sync_",
    )
    assert not [name for name in CALLS if any(word in name for word in words)]
    assert allowing_filter("riscv64") == b""


def deep_tree(folder: Path, depth: int) -> None:
    """A tree far deeper than a path can be long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 9, dir_fd=here)
        below = os.open("d" * 9, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def test_a_folder_is_removed_however_deep_closed_or_odd_it_is_and_no_link_followed(outside: Path) -> None:
    scratch = outside.parent / "scratch"
    scratch.mkdir()
    deep_tree(scratch, 1500)
    (scratch / "closed" / "in" / "it").mkdir(parents=True)
    (scratch / "closed" / "file").touch(0)
    os.mkfifo(scratch / "closed" / "pipe")
    (scratch / "closed" / "link").symlink_to(outside)
    (scratch / "link").symlink_to(outside / "canary")
    (scratch / "closed" / "in").chmod(0)
    (scratch / "closed").chmod(0)
    scratch.chmod(0)
    (outside.parent / "alias").symlink_to(outside)
    assert remove_tree(str(scratch)) and not scratch.exists()
    assert not remove_tree(str(outside.parent / "alias")) and outside.is_dir()
    assert remove_tree(str(outside.parent / "absent"))


@LINUX
def test_locked_files_are_unlocked_and_removed_or_left_and_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (folder / "locked").mkdir(parents=True)
    (folder / "locked" / "file").touch()
    (folder / "other").touch()
    flags = subprocess.run(["chattr", "+i", folder / "locked" / "file", folder / "locked"], capture_output=True)
    if flags.returncode:
        pytest.skip("this file system, or this user, has no immutable files")
    assert remove_tree(str(folder)) and not folder.exists()
