"""Runs one program under limits: the child process of `execution`, which starts this file by its path.

It imports nothing of dsquant. It reads {program, secret, reply_fd, limits, filter} from standard input, gives up its
rights, writes which ones to the file descriptor, runs the program and writes its outcome. See `execution` for what is
not covered.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

# Landlock's rights to files by the version of its interface that they came with: thirteen, then refer, truncate, ioctl.
LANDLOCK_RIGHTS = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 5: 2**16 - 1}
# Since 4 it closes TCP, since 6 abstract sockets of others and signals to them: bits in words of their own.
LANDLOCK_NETWORK, LANDLOCK_SCOPES = 0b11, 0b11
EXECUTE, WRITE, READ, READ_FOLDER, TRUNCATE = 1, 2, 4, 8, 2**14
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
# What Python itself reads: its library, shared libraries, time zones.
READABLE: tuple[str, ...] = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
READABLE += ("/etc/localtime", "/etc/ld.so.cache", "/dev/urandom", "/dev/zero")
# Mounts, network, System V's IPC; a user of its own who may make these; the mounts' flags.
NEW_MOUNTS, NEW_NETWORK, NEW_IPC, NEW_USER = 0x20000, 0x40000000, 0x08000000, 0x10000000
NOSUID, NODEV, NOEXEC, RECURSIVE, PRIVATE = 2, 4, 8, 0x4000, 0x40000
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES, SET_SECCOMP = 1, 4, 38, 22
CAPABILITY_VERSION = 0x20080522
SIGKILL = 9
NOBODY = 65534
DENIED_EVENTS = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.startfile", "os.kill", "os.putenv", "pty.", "signal.", "syslog.", "webbrowser.", "ftplib.", "smtplib.",
    "os.chmod", "os.chown", "os.lchown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr",
)  # fmt: skip
# Event -> its first and last argument that is a path, and that of the folder which the first is relative to.
CHANGING_EVENTS: dict[str, tuple[int, int, int]] = {
    "os.remove": (0, 0, 1),
    "os.rmdir": (0, 0, 1),
    "os.mkdir": (0, 0, 2),
    "os.rename": (0, 1, 2),
    "os.link": (0, 1, 2),
    "os.symlink": (1, 1, 2),
}


def main() -> None:
    """Reads the request, gives up its rights, runs the program, replies."""
    request = json.loads(sys.stdin.buffer.read())
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    folder = os.path.realpath(os.curdir)
    limits = request["limits"]
    protections = [
        limit_resources(limits),
        take_own_file_system(folder, limits["folder_bytes"]),
        give_up_rights(folder),
        close_files(folder),
        close_calls(bytes.fromhex(request["filter"])),
    ]
    sys.addaudithook(refuse_from_now_on(folder))
    # What is used behind the program is fetched before it, which can put anything in the place of a module's functions.
    reply, leave, descriptor, encode = os.write, os._exit, request["reply_fd"], str.encode
    secret, program = request["secret"], request["program"]
    sys.modules["__main__"] = type(sys)("__main__")
    del request
    reply(descriptor, json.dumps(protections).encode() + b"\n")
    outcome, error = run(program)
    reply(descriptor, encode(f"{secret} {outcome}\n{error:.200}", "utf-8", "replace"))
    leave(0)  # no exit handlers of the program's


def limit_resources(limits: dict[str, int]) -> str:
    """Sets the limits that the kernel enforces; returns them in words."""
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
        # A second of grace for CPU time: the soft limit's signal shows why the process ended.
        resource.setrlimit(kind, (lowest, lowest + 1 if kind == resource.RLIMIT_CPU and lowest == value else lowest))
    return f"{seconds} s of CPU time, {memory >> 20} MiB of memory, files of {size >> 20} MiB"


def _call(name: str, *arguments: Any) -> int:
    """Calls a function of the C library; raises OSError where it fails."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    found = int(getattr(libc, name)(*arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _control(option: int, *values: int) -> None:
    """Calls prctl: all its arguments are long, or unset ones are noise."""
    import ctypes

    _call("prctl", *(ctypes.c_ulong(value) for value in (option, *values, *(0,) * (4 - len(values)))))


def take_own_file_system(folder: str, size: int) -> str:
    """Mounts a small file system in memory over the folder until the process ends; returns the outcome in words."""
    try:
        _leave_namespaces()
        _call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
        options = f"size={size},nr_inodes={size >> 12},mode=0700"
        _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", NOSUID | NODEV | NOEXEC, options.encode())
        os.chdir(folder)
    except (OSError, ImportError, AttributeError) as error:
        return f"its folder on the disk, as full as it makes it ({type(error).__name__}: {error})"
    return f"its folder in memory, of {size >> 20} MiB, gone when it ends"


def _leave_namespaces() -> None:
    """Unshares mounts, network and IPC; without root that needs a user namespace of its own."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", NEW_MOUNTS | NEW_NETWORK | NEW_IPC | (NEW_USER if user else 0))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(text)


def give_up_rights(folder: str) -> str:
    """Gives up root's user and all capabilities permanently; returns the outcome in words."""
    remark = _become_nobody(folder) if os.geteuid() == 0 else ""
    try:
        _control(SET_NO_NEW_PRIVILEGES, 1)
        _control(SET_DUMPABLE, 0)
        _control(SET_DEATH_SIGNAL, SIGKILL)  # ends with dsquant, however that ends
        _call("capset", struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24))
    except (OSError, ImportError, AttributeError) as error:
        return f"the rights of user {os.geteuid()}{remark} ({type(error).__name__}: {error})"
    return f"user {os.geteuid()}{remark} without capabilities"


def _become_nobody(folder: str) -> str:
    """Changes to a user who owns nothing, where he can read Python's library; returns why not, in words."""
    try:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        reachable = all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in (folder, _library()))
        os.seteuid(0)
        if not reachable:
            os.chown(folder, 0, 0)
            return " (Python's library is closed to others)"
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except (OSError, NotImplementedError) as error:
        return f" ({type(error).__name__}: {error})"
    return ""


def _library() -> str:
    return os.path.dirname(os.path.realpath(os.__file__))  # noqa: PTH120 - pathlib would have to be imported


def close_files(folder: str) -> str:
    """Lets the kernel refuse files outside a folder and Python's library (Landlock); returns the outcome in words."""
    try:
        _install_landlock(folder)
    except (OSError, ImportError, AttributeError) as error:
        return f"files guarded by Python's audit hook only, and only against changes ({type(error).__name__}: {error})"
    return "files outside its folder and Python's library closed by Landlock"


def _install_landlock(folder: str) -> None:
    import ctypes

    interface = _call("syscall", CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = max(value for since, value in LANDLOCK_RIGHTS.items() if since <= interface)
    handled = struct.pack("QQQ", rights, LANDLOCK_NETWORK, LANDLOCK_SCOPES)
    handled = handled[: 8 if interface < 4 else 16 if interface < 6 else 24]
    rules = _call("syscall", CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    wanted = dict.fromkeys((*READABLE, _library(), sys.base_prefix + "/lib"), READ | READ_FOLDER)
    wanted |= {os.devnull: READ | WRITE | TRUNCATE, folder: rights & ~EXECUTE}
    for path, allowed in wanted.items():
        if not os.path.exists(path):  # noqa: PTH110
            continue
        if not os.path.isdir(path):  # noqa: PTH112
            allowed &= WRITE | READ | TRUNCATE
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed & rights, place), 12)
        _call("syscall", ADD_RULE, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(place)
    _call("syscall", RESTRICT_SELF, rules, ctypes.c_uint32(0))
    os.close(rules)


def close_calls(code: bytes) -> str:
    """Lets the kernel refuse every call that a filter does not allow (seccomp); returns the outcome in words."""
    try:
        if not code:
            raise OSError("no list of calls for this processor")
        _install_seccomp(code)
    except (OSError, ImportError, AttributeError) as error:
        return f"network and processes closed by Python's audit hook only ({type(error).__name__}: {error})"
    return "network, processes, threads and other calls of the kernel closed by seccomp"


def _install_seccomp(code: bytes) -> None:
    import ctypes

    program = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(program)))
    filter_mode = 2
    _control(SET_SECCOMP, filter_mode, ctypes.addressof(header))


def refuse_from_now_on(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Returns an audit hook that refuses processes, sockets, and changes outside a folder."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(DENIED_EVENTS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and _writes_outside(arguments[0], arguments[2], folder):
            raise PermissionError(f"writing to {arguments[0]!r} is not allowed here")
        if event in CHANGING_EVENTS and _changes_outside(event, arguments, folder):
            raise PermissionError(f"{event} of {arguments[:2]!r} is not allowed here")

    return hook


def _writes_outside(path: Any, flags: Any, folder: str) -> bool:
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if not writes or isinstance(path, int) or path == os.devnull:
        return False
    real = os.fsdecode(os.path.realpath(path)) if isinstance(path, str | bytes) else ""
    return not (real + os.sep).startswith(folder + os.sep)


def _changes_outside(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    first, last, bases = CHANGING_EVENTS[event]
    return not all(
        _lies_inside(arguments[number], arguments[bases + number - first], folder) for number in range(first, last + 1)
    )


def _lies_inside(path: Any, base: int, folder: str) -> bool:
    """Returns whether a path's parent folder is a folder or lies below it, through any links."""
    if not isinstance(path, str | bytes):
        return False
    above = os.path.dirname(os.fsdecode(path).rstrip("/")) or "."  # noqa: PTH120
    root, home = os.stat("/"), os.stat(folder)  # noqa: PTH116
    try:
        while not os.path.samestat(found := os.stat(above, dir_fd=None if base == -1 else base), home):
            if os.path.samestat(found, root):
                return False
            above += "/.."
    except (FileNotFoundError, NotADirectoryError):
        return True  # the call itself will say so
    except OSError:
        return False
    return True


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
