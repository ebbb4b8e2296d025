"""What a process can give up for good, one function each. Standard library only.

The last four functions are layers: OSError where the kernel, or a container around us, refuses one. The others do
what they can on Linux and nothing elsewhere.
"""

import contextlib
import ctypes
import os
import resource
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 22, 38
SIGKILL = 9


def _libc(name: str, *arguments) -> int:
    """A C library call with OSError for errors."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        function = getattr(libc, name)
    except AttributeError as error:
        raise OSError(f"no {name} on this system") from error
    result = function(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Limits on this process and all that come from it; nothing may be written to a file."""
    bounds = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        with contextlib.suppress(ValueError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(kind, (bound, bound))


def forbid_processes() -> None:
    """No new process or thread, whatever number the user has: the kernel exempts only root."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def die_with_parent() -> None:
    with contextlib.suppress(OSError):
        _libc("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Other processes of the same user can neither trace this one nor read its /proc entries."""
    with contextlib.suppress(OSError):
        _libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def drop_capabilities() -> None:
    """All of them, and the ways to new ones."""
    with contextlib.suppress(OSError):
        _libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        for capability in range(64):
            with contextlib.suppress(OSError):  # beyond the last one, or not held
                _libc("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
        version_3 = 0x20080522
        _libc("capset", struct.pack("Ii", version_3, 0), bytes(24))


def leave_root(readable: list[str]) -> None:
    """From root to a user id that nobody has. OSError, and still root, if that user could not read `readable`."""
    user = 61184 + os.getpid() % 4000
    os.setegid(user)
    os.seteuid(user)
    try:
        for path in readable:
            os.scandir(path).close() if os.path.isdir(path) else open(path, "rb").close()
    finally:
        os.seteuid(0)
        os.setegid(0)
    os.chown(".", user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _libc("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or the maps of a new user namespace could not be written


def new_namespaces() -> None:
    """Own users, network (none), IPC, mounts with an empty /proc; and processes, for the next child."""
    user, group = os.geteuid(), os.getegid()
    new_user, new_pid, new_net, new_ipc, new_mounts = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000
    _libc("unshare", new_user | new_pid | new_net | new_ipc | new_mounts)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    recursive_private, read_only = 0x4000 | 1 << 18, 1
    _libc("mount", b"none", b"/", None, recursive_private, None)
    _libc("mount", b"none", b"/proc", b"tmpfs", read_only, None)


def restrict_files(readable: list[str]) -> None:
    """Landlock (Linux 5.13): only files below `readable` can be opened, and those only to read."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    read_file, read_dir = 1 << 2, 1 << 3
    version = _libc("syscall", create_ruleset, None, 0, 1)
    rights = (1 << {1: 13, 2: 14}.get(version, 15)) - 1  # execute, write, read, remove, make ...; refer; truncate
    network, scope = 3 * (version >= 4), 3 * (version >= 6)  # TCP bind and connect; abstract sockets and signals
    attributes = struct.pack("QQQ", rights, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _libc("syscall", create_ruleset, attributes, len(attributes), 0)
    for path in readable:
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = read_file | (read_dir if os.path.isdir(path) else 0)
            _libc("syscall", add_rule, rules, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    _libc("syscall", restrict_self, rules, 0)
    os.close(rules)


# System calls that computing in Python and importing modules need: numbers of x86-64.
_ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79,
    "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "arch_prctl": 158,
    "gettid": 186, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292,
    "pipe2": 293, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_OPENAT, _FCNTL = 257, 72
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC


def filter_system_calls() -> None:
    """Seccomp: only the calls above; files open to read only. The others answer ENOSYS, another ABI kills."""
    if sys.platform != "linux" or os.uname().machine != "x86_64" or sys.maxsize < 1 << 32:
        raise OSError("the list of system calls is for x86-64 Linux")
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | 38

    def op(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        """One BPF instruction; `then` and `otherwise`: how many to skip."""
        return struct.pack("HBBI", code, then, otherwise, value)

    def argument(index: int) -> bytes:
        return op(load, 16 + 8 * index)  # its low half

    number = op(load, 0)
    program = [op(load, 4), op(equal, 0xC000003E, 1), op(answer, kill), number, op(at_least, 1 << 30, 0, 1)]
    program += [op(answer, kill)]
    program += [op(equal, _OPENAT, 0, 4), argument(2), op(has_bits, _WRITING, 1), op(answer, allow)]
    program += [op(answer, refuse)]
    for command in _FCNTL_COMMANDS:
        program += [number, op(equal, _FCNTL, 0, 3), argument(1), op(equal, command, 0, 1), op(answer, allow)]
    program += [number]
    for call in _ALLOWED.values():
        program += [op(equal, call, 0, 1), op(answer, allow)]
    program += [op(answer, refuse)]
    code = ctypes.create_string_buffer(b"".join(program))
    filter_mode = 2
    _libc("prctl", PR_SET_SECCOMP, filter_mode, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)), 0, 0)
