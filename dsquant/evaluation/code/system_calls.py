"""Lists the calls of the Linux kernel that a program under limits may make: all others fail.

An allow list, not a deny list: the kernel gains calls with every release. Allowed calls read, create, rename and remove
files (where `sandbox` leaves any in reach), handle memory and time, or describe the process itself. Not allowed:
sockets, processes, threads, signals to others, permissions, owners, times and attributes of files, clocks, mounts,
namespaces, keys, shared memory and message queues that outlive their creator.
"""

import struct

# Bits of the architecture as seccomp names it, and the column below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# Call -> its numbers on x86-64 and on aarch64, which lacks the older ones.
CALLS: dict[str, tuple[int, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "msync": (26, 227), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "sendfile": (40, 71), "exit": (60, 93), "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None), "readlink": (89, None),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "statfs": (137, 43), "fstatfs": (138, 44), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, None), "epoll_ctl": (233, 21), "openat": (257, 56), "mkdirat": (258, 34),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "epoll_pwait": (281, 22), "fallocate": (285, 47), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70), "getcpu": (309, 168), "renameat2": (316, 276),
    "getrandom": (318, 278), "copy_file_range": (326, 285), "preadv2": (327, 286), "pwritev2": (328, 287),
    "statx": (332, 291), "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# Calls that are allowed with some values of one argument alone: numbers, the argument's place, values.
PARTLY: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # Copies, flags and locks of a file; not whom it signals.
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    # Whether it is a terminal and how large, bytes to read, waiting, inheriting; not a file's flags.
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)),
    # Limits of the process itself, which only fall.
    "prlimit64": ((302, 261), 0, (0,)),
}
LOAD, EQUAL, LEAVE = 0x20, 0x15, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
# Where the kernel puts a call's number, the architecture and the arguments, 8 bytes each, low word first.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16


def allowing_filter(machine: str) -> bytes:
    """Builds a classic BPF filter for seccomp: a call off the list fails with EPERM, another architecture is killed.

    `machine` is a name of `platform.machine`. Returns instructions of 8 bytes each; empty for a machine without a list.
    """
    if machine not in MACHINES:
        return b""
    architecture, column = MACHINES[machine]
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (LEAVE, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            steps += [(EQUAL, 0, 1, number), (LEAVE, 0, 0, ALLOW)]
    for partly, place, values in PARTLY.values():
        choices = [step for value in values for step in ((EQUAL, 0, 1, value), (LEAVE, 0, 0, ALLOW))]
        checks = [(LOAD, 0, 0, ARGUMENTS + 8 * place), *choices, (LEAVE, 0, 0, REFUSE)]
        steps += [(EQUAL, 0, len(checks), partly[column]), *checks]
    steps.append((LEAVE, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *step) for step in steps)
