"""Runs one program under limits: the child process of `execution`, which starts this file by its path.

It imports nothing of dsquant. It reads {program, reply_fd, limits} from standard input, gives up what it can, runs the
program and writes {outcome, error, protections} to the file descriptor. See `execution` for what is not covered.
"""

import json
import os
import platform
import struct
import sys
from collections.abc import Callable
from typing import Any

# Calls of the kernel that make sockets or processes, or reach into other ones, their limits and priorities included:
# (x86-64, aarch64).
DENIED_CALLS = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "io_uring_setup": (425, 425),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# Landlock's rights by the version of its interface that they came with: thirteen, then refer, truncate, ioctl.
LANDLOCK_RIGHTS = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 5: 2**16 - 1}
EXECUTE, WRITE, READ, READ_FOLDER, TRUNCATE = 1, 2, 4, 8, 2**14
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
# What Python itself reads: its library, shared libraries, time zones.
READABLE: tuple[str, ...] = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
READABLE += ("/etc/localtime", "/etc/ld.so.cache", "/dev/urandom", "/dev/zero")
DENIED_EVENTS: tuple[str, ...] = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
)
DENIED_EVENTS += ("os.startfile", "os.kill", "os.putenv", "pty.", "signal.", "webbrowser.", "ftplib.", "smtplib.")
CHANGING_EVENTS: tuple[str, ...] = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
)
CHANGING_EVENTS += ("os.truncate", "os.utime", "shutil.")


def main() -> None:
    """Reads the request, runs it, replies."""
    request = json.loads(sys.stdin.read())
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    folder = os.path.realpath(os.curdir)
    protections = [limit_resources(request["limits"]), close_files(folder), close_network_and_processes()]
    sys.addaudithook(refuse_from_now_on(folder))
    outcome, error = run(request["program"])
    reply = {"outcome": outcome, "error": error, "protections": protections}
    os.write(request["reply_fd"], json.dumps(reply).encode())
    os._exit(0)  # no exit handlers of the program's


def limit_resources(limits: dict[str, int]) -> str:
    """Sets the limits that the kernel keeps; returns what they are, in words."""
    import resource

    seconds, memory, size = limits["seconds"], limits["memory_bytes"], limits["file_bytes"]
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second of grace for CPU time: the soft limit's signal tells why the process ended.
        resource.setrlimit(kind, (lowest, lowest + 1 if kind == resource.RLIMIT_CPU and lowest == value else lowest))
    return f"{seconds} s of CPU time, {memory >> 20} MiB of memory, files of {size >> 20} MiB"


def close_files(folder: str) -> str:
    """Lets the kernel refuse files outside a folder and Python's library (Landlock); returns what came of it."""
    try:
        _install_landlock(folder)
    except (OSError, ImportError, AttributeError) as error:
        return f"files guarded by Python's audit hook only, and only against changes ({type(error).__name__}: {error})"
    return "files outside its folder and Python's library closed by Landlock"


def _install_landlock(folder: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: Any) -> int:
        found = libc.syscall(number, *arguments)
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(found)

    interface = call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = max(value for since, value in LANDLOCK_RIGHTS.items() if since <= interface)
    handled = ctypes.create_string_buffer(struct.pack("Q", rights), 8)
    rules = call(CREATE_RULESET, handled, ctypes.c_size_t(8), ctypes.c_uint32(0))
    library = os.path.dirname(os.path.realpath(os.__file__))  # noqa: PTH120 - pathlib would have to be imported
    wanted = {**dict.fromkeys((*READABLE, library, sys.base_prefix + "/lib"), READ | READ_FOLDER | EXECUTE)}
    wanted |= {os.devnull: READ | WRITE | TRUNCATE, folder: rights & ~EXECUTE}
    for path, allowed in wanted.items():
        if not os.path.exists(path):  # noqa: PTH110
            continue
        if not os.path.isdir(path):  # noqa: PTH112
            allowed &= EXECUTE | WRITE | READ | TRUNCATE
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed & rights, place), 12)
        call(ADD_RULE, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(place)
    _refuse_new_privileges(libc)
    call(RESTRICT_SELF, rules, ctypes.c_uint32(0))
    os.close(rules)


def _refuse_new_privileges(libc: Any) -> None:
    """What the kernel wants first from who restricts himself."""
    import ctypes

    set_no_new_privileges = 38
    if libc.prctl(*(ctypes.c_ulong(value) for value in (set_no_new_privileges, 1, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def close_network_and_processes() -> str:
    """Lets the kernel refuse sockets, processes and threads (seccomp); returns what came of it, in words."""
    try:
        _install_seccomp()
    except (OSError, ImportError, AttributeError, KeyError) as error:
        return f"network and processes closed by Python's audit hook only ({type(error).__name__}: {error})"
    return "network, processes and threads closed by seccomp"


def _install_seccomp() -> None:
    """A filter of classic BPF: another architecture is killed, a denied call fails with EPERM, others pass."""
    import ctypes

    column, architecture = MACHINES[platform.machine()]
    numbers = [number for pair in DENIED_CALLS.values() if (number := pair[column]) is not None]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    # Numbers from 2**30 on are calls of the x32 interface, which would get round the list.
    code += [(at_least, len(numbers) + 1, 0, 0x40000000)]
    code += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(leave, 0, 0, allow), (leave, 0, 0, refuse)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    _refuse_new_privileges(libc)
    set_seccomp, filter_mode = 22, 2
    arguments = (set_seccomp, filter_mode, ctypes.addressof(header), 0, 0)
    if libc.prctl(*(ctypes.c_ulong(value) for value in arguments)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def refuse_from_now_on(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses processes, sockets, and changes outside a folder."""

    def inside(path: Any) -> bool:
        text = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        return text == os.devnull or (os.path.realpath(text) + os.sep).startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(DENIED_EVENTS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not isinstance(path, int) and not inside(path):
                raise PermissionError(f"writing to {path!r} is not allowed here")
        elif event.startswith(CHANGING_EVENTS) and arguments and not inside(arguments[0]):
            raise PermissionError(f"{event} of {arguments[0]!r} is not allowed here")

    return hook


def run(program: str) -> tuple[str, str]:
    """Runs a program; returns the outcome and the error's name."""
    try:
        # Not __main__: what stands under `if __name__ == "__main__"` is not part of the answer.
        exec(compile(program, "<completion>", "exec"), {"__name__": "completion"})
    except AssertionError:
        return "failed", "AssertionError"
    except MemoryError:
        return "memory limit", "MemoryError"
    except BaseException as error:
        return "error", type(error).__name__
    return "passed", ""


if __name__ == "__main__":
    main()
