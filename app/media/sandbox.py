"""Takes from a process, for good, what decoding a video does not need: files, sockets, programs, other processes.

Two independent Linux features, each used where the kernel has it: Landlock denies files and TCP, a seccomp filter all
system calls but the few listed here. Both are asked for through ctypes, since Python has no functions for them.
"""
import ctypes
import errno
import os
import platform
import struct

NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS, which both features require of a process without root's rights

# number on x86_64 and on aarch64 (Linux's asm/unistd.h)
SECCOMP = {"x86_64": 317, "aarch64": 277}
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same on both

READABLE_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # version of Landlock: kinds of access to files it knows; then 16

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of CALLS
CALLS = {  # what FFmpeg, OpenCV and Python call between two frames: memory, threads, clocks, pipes that are open
    "read": (0, 63), "write": (1, 64), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "gettimeofday": (96, 169), "getrusage": (98, 165), "getrandom": (318, 278),
    "getpid": (39, 172), "gettid": (186, 178), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
}
PROT_EXEC = 4
THREAD = 0x10100  # CLONE_VM | CLONE_THREAD: a thread of this process, not a process
ARGUMENTS = {  # calls that are allowed only if (argument & mask) == value, for each (argument's position, mask, value)
    "mmap": (9, 222, [(2, PROT_EXEC, 0)]), "mprotect": (10, 226, [(2, PROT_EXEC, 0)]),
    "clone": (56, 220, [(0, THREAD, THREAD)]),
    "prlimit64": (302, 261, [(0, 0xFFFFFFFF, 0), (1, 0xFFFFFFFF, 0)]),  # this process's RLIMIT_CPU, set for each video
}
FIRST_NEW_CALL = 424  # from here on, numbers are the same everywhere, and libraries expect that a kernel lacks them

# seccomp's instructions (linux/bpf_common.h), offsets into its data, and what it answers (linux/seccomp.h)
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
ALLOW, KILL, FAIL_WITH = 0x7FFF0000, 0x80000000, 0x00050000

libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def forbid_files():
    """Let no file or directory be opened, created or changed from now on, no TCP port be bound or connected to, no
    process outside be signalled: as much of it as the kernel's version of Landlock knows. Returns whether it has
    Landlock.

    Holds for the calling thread and those it starts. It takes a file descriptor while it runs.
    """
    version = call(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1 or not forbid_privileges():
        return False
    denied = struct.pack("QQQ", 2 ** READABLE_BITS.get(version, 16) - 1, 3, 3)  # files, TCP, signals and sockets
    rules = call(LANDLOCK_CREATE_RULESET, denied, 8 if version < 4 else 16 if version < 6 else 24, 0)
    if rules < 0:
        return False
    try:
        return call(LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


def forbid_calls():
    """Let all threads make only the system calls that decoding needs; others fail with EPERM, those newer than 2019
    with ENOSYS, so that libraries fall back to what they did before (clone3 to clone). Returns whether the kernel has
    seccomp filters and the architecture is a known one."""
    machine = platform.machine()
    if machine not in ARCHITECTURES or not forbid_privileges():
        return False
    instructions = call_filter(*ARCHITECTURES[machine])
    program = Program(len(instructions), b"".join(struct.pack("HBBI", *each) for each in instructions))
    return call(SECCOMP[machine], 1, 1, ctypes.byref(program)) == 0  # SECCOMP_SET_MODE_FILTER, for all threads


def call_filter(architecture, column):
    """The seccomp filter as [(instruction, jump if true, jump if false, operand)]."""
    refuse = (RETURN, 0, 0, FAIL_WITH | errno.EPERM)
    program = [(LOAD, 0, 0, ARCHITECTURE_AT), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
               (LOAD, 0, 0, NUMBER_AT)]
    for numbers in CALLS.values():
        program += [(JUMP_IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    for *numbers, conditions in ARGUMENTS.values():
        checks = []
        for position, mask, value in conditions:
            checks += [(LOAD, 0, 0, ARGUMENTS_AT + 8 * position), (AND, 0, 0, mask),
                       (JUMP_IF_EQUAL, 1, 0, value), refuse]
        program += [(JUMP_IF_EQUAL, 0, len(checks) + 1, numbers[column]), *checks, (RETURN, 0, 0, ALLOW)]
    return [*program, (JUMP_IF_AT_LEAST, 0, 1, FIRST_NEW_CALL), (RETURN, 0, 0, FAIL_WITH | errno.ENOSYS), refuse]


def forbid_privileges():
    return libc.prctl(*map(ctypes.c_ulong, (NO_NEW_PRIVILEGES, 1, 0, 0, 0))) == 0


def call(number, *arguments):
    """A system call's result, -1 for an error."""
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
