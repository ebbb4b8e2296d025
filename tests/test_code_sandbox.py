"""The code sandbox: right code passes, wrong code fails, and hostile code gets nowhere and fails.

`attack()` returns True if it got what it was after, and its test asks for just that; the tests of `FORGERIES` ask for a
value that the code does not know. So a verdict of "passed" means that an attack succeeded.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cdlm_jax.config import InputError
from cdlm_jax.evaluation import code_sandbox
from cdlm_jax.evaluation.code_sandbox import LAYERS, Isolation, Limits, isolation, passes, run
from cdlm_jax.tasks.public import Program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are Linux's")
QUICK = Limits(seconds=2.0, memory_bytes=256 << 20)
BRIEF = Limits(seconds=0.5, memory_bytes=256 << 20)
SECRET = "the secret of the host"
FILTERED = ("unprivileged", "system calls")  # where user namespaces and Landlock are refused


def program(code, *tests, names=("f",), setup=""):
    return Program(code, tests, names, setup)


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is below `folder`, also a removed one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                place = os.readlink(entry / "cwd")
            except OSError:
                continue
            if place.startswith(str(folder)):
                found.append(int(entry.name))
    return found


@pytest.fixture
def host(tmp_path, monkeypatch):
    """What attacks are after: a file with a secret, a folder to write to. Checks that nothing happened to either."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret").write_text(SECRET)
    sandboxes = tmp_path / "sandboxes"
    sandboxes.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(sandboxes))
    tmp_path.chmod(0o755)
    home.chmod(0o777)
    sandboxes.chmod(0o777)
    yield home
    assert [path.name for path in home.iterdir()] == ["secret"]
    assert (home / "secret").read_text() == SECRET
    assert processes_in(sandboxes) == []
    assert list(sandboxes.iterdir()) == []


# ---------------------------------------------------------------- right and wrong code


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2"),
        ("def f(*a, **b): return [a, b]", "assert f(1, (2,), k={3: {4}}) == [(1, (2,)), {'k': {3: {4}}}]"),
        ("def f(x): return x", "assert [f(v) for v in (None, True, b'a', 1j, 1.5, 'é\\ud800', 10 ** 5000)][0] is None"),
        ("def f(x): return x", "assert f(10 ** 5000) == 10 ** 5000 and f(float('inf')) == float('inf')"),
        ("def f(x): return x", "assert f(frozenset({1, (2, 3)})) == {1, (2, 3)} and f(range(3)) == range(3)"),
        ("def f(x): return x is True", "assert f(True) is True and f(1) is False"),
        ("def f(x): return (i * i for i in range(x))", "assert list(f(3)) == [0, 1, 4]"),
        ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2'] and f([1]) != ['1']"),
        ("def f(x): return {1: 2}.items()", "assert list(f(0)) == [(1, 2)]"),
        (
            "from collections import Counter, OrderedDict\ndef f(x): return Counter(x)",
            "assert f('aab') == {'a': 2, 'b': 1}",
        ),
        (
            "from fractions import *\nfrom decimal import *\ndef f(x): return Fraction(1, 2), Decimal('0.5')",
            "assert f(0) == (0.5, 0.5)",
        ),
        ("import re\ndef f(x): return re.match('a', x)", "assert f('abc') and not f('b')"),
        ("def f(x, kind): return isinstance(x, kind)", "assert f(1, int) and not f('1', int)"),
        ("class f:\n def __init__(self, x): self.x = x\n def __call__(self): return self.x", "assert f(3)() == 3"),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int\ndef f(x): return P(x).x",
            "assert f(3) == 3",
        ),
        ("import bisect, datetime, functools, heapq, itertools, json, random\ndef f(x): return x", "assert f(1)"),
        ("import time\ndef f(x): time.sleep(0.01); print('x' * 10 ** 6); return x", "assert f(1)"),
        (
            "def f(x): raise ValueError(x)",
            "try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    assert False",
        ),
        ("if __name__ == '__main__':\n    1 / 0\ndef f(x): return x", "assert f(1)"),
    ],
)
def test_right_code_passes(code, test):
    verdict = run(program(code, test), QUICK)
    assert verdict.passed, verdict.reason
    assert verdict.reason == "passed"


@pytest.mark.parametrize(
    ("code", "test", "reason"),
    [
        ("def f(x): return x", "assert f(1) == 2", "a test failed"),
        ("def f(x): return [1]", "assert f(1) == (1,)", "a test failed"),
        ("def f(x): return g(x)", "assert f(1) == 2", "the code raised an exception"),
        ("def f(x): return", "assert len(f(1)) == 2", "a test raised TypeError"),
        ("def f(:", "assert True", "the code raised an exception"),
        ("def g(x): return x", "assert True", "the code raised an exception"),
        ("def f(x): return x\nraise ValueError", "assert f(1)", "the code raised an exception"),
        ("def f(x): return x", "assert f(lambda: 1)", "a test raised TypeError"),
    ],
)
def test_wrong_code_fails(code, test, reason):
    verdict = run(program(code, test), QUICK)
    assert not verdict.passed
    assert verdict.reason == reason


@pytest.mark.parametrize(
    "code", ["while True: pass", "def f(x):\n    while True: pass", "import time\ndef f(x): time.sleep(9); return x"]
)
def test_late_code_fails(code):
    verdict = run(program(code, "assert f(1)"), BRIEF)
    assert (verdict.passed, verdict.reason) == (False, "not done after 0.5 s")


def test_all_tests_must_hold():
    code = "def f(x): return 2"
    assert run(program(code, "assert f(1) == 2", "assert f(2) == 2"), QUICK).passed
    assert not run(program(code, "assert f(1) == 2", "assert f(2) == 3"), QUICK).passed
    assert not run(program(code, "assert f(1) == 3", "assert f(2) == 2"), QUICK).passed


def test_the_setup_is_the_tests_own():
    """The code's helper of the same name is not used."""
    code = "def twice(x): return 0\ndef f(x): return twice(x)"
    assert not run(program(code, "assert f(2) == twice(2)", setup="def twice(x): return 2 * x"), QUICK).passed


def test_numpy_can_be_used():
    pytest.importorskip("numpy")
    code = "import numpy as np\ndef f(x): return np.array(x).sum(), [np.float64(0.5)], np.bool_(True)"
    assert run(program(code, "assert f([1, 2]) == (3, [0.5], True)"), Limits(seconds=10)).passed


# ---------------------------------------------------------------- hostile code

# True: harmless enough to show, outside of the sandbox, that the attack is one.
ATTACKS = {
    "fork bomb": (True, """
import os, time
def attack():
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(0.5)
            os._exit(0)
    return True
"""),
    "thread bomb": (True, """
import threading, time
def attack():
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(0.3,)).start()
    return True
"""),
    "threads that never end": (False, """
import threading
def work():
    while True:
        pass
for _ in range(8):
    threading.Thread(target=work).start()
def attack():
    return True
"""),
    "memory bomb": (True, """
def attack():
    hoard = [bytearray(64 << 20) for _ in range(6)]
    return len(hoard) == 6
"""),
    "memory bomb of a number": (False, """
def attack():
    return (1 << (1 << 34)) > 0
"""),
    "endless loop that ignores signals": (False, """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def attack():
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""),
    "sleeping for ever": (False, """
import time
def attack():
    time.sleep(10 ** 6)
    return True
"""),
    "deep recursion": (False, """
import sys
sys.setrecursionlimit(10 ** 9)
def attack():
    return [attack()]
"""),
    "writing outside": (True, """
def attack():
    with open('HOME/written', 'w') as file:
        file.write('x')
    return True
"""),
    "appending to a file": (False, """
def attack():
    with open('HOME/secret', 'a') as file:
        file.write('x')
    return True
"""),
    "removing, renaming, linking": (False, """
import os
def attack():
    done = 0
    for deed in (
        lambda: os.unlink('HOME/secret'),
        lambda: os.rename('HOME/secret', 'HOME/other'),
        lambda: os.mkdir('HOME/folder'),
        lambda: os.truncate('HOME/secret', 0),
        lambda: os.link('HOME/secret', 'HOME/hard'),
        lambda: os.chmod('HOME/secret', 0),
        lambda: os.utime('HOME/secret', (0, 0)),
        lambda: os.mkfifo('HOME/fifo'),
        lambda: os.open('HOME/secret', os.O_RDONLY | os.O_TRUNC),
    ):
        try:
            deed()
            done += 1
        except OSError:
            pass
    return done > 0
"""),
    "symbolic link to the outside": (True, """
import os
def attack():
    os.symlink('HOME/written', 'link')
    with open('link', 'w') as file:
        file.write('x')
    return True
"""),
    "filling the disk": (True, """
import os
def attack():
    with open('large', 'wb', buffering=0) as file:
        for _ in range(16):
            file.write(bytes(1 << 20))
        return os.fstat(file.fileno()).st_size == 16 << 20
"""),
    "filling the shared memory": (True, """
import os
def attack():
    with open('/dev/shm/hostile', 'wb', buffering=0) as file:
        file.write(bytes(1 << 20))
    os.unlink('/dev/shm/hostile')
    return True
"""),
    "a thousand files": (True, """
def attack():
    for number in range(1000):
        open(str(number), 'w').close()
    return True
"""),
    "opening a thousand descriptors": (False, """
def attack():
    return len([open('/dev/null') for _ in range(1000)]) == 1000
"""),
    "sockets": (True, """
import socket
def attack():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).bind(('127.0.0.1', 0))
    return True
"""),
    "a connection through an inherited name service": (False, """
import socket
def attack():
    done = 0
    for family in (socket.AF_UNIX, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
        try:
            socket.socket(family, socket.SOCK_RAW if family == socket.AF_PACKET else socket.SOCK_DGRAM)
            done += 1
        except OSError:
            pass
    return done > 0
"""),
    "another program": (True, """
import subprocess
def attack():
    return subprocess.run(['/bin/sh', '-c', 'exit 7']).returncode == 7
"""),
    "becoming another program": (False, """
import os
def attack():
    os.execv('/bin/sh', ['sh', '-c', 'while true; do echo \\\\{\\\\"value\\\\": true\\\\} >&4; done'])
"""),
    "a daemon that survives": (False, """
import os, time
def attack():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(30)
        os._exit(0)
    return True
"""),
    "killing the parent": (False, """
import os, signal
def attack():
    os.kill(os.getppid(), signal.SIGKILL)
    return True
"""),
    "signalling the host": (True, """
import os, signal
def attack():
    os.kill(HOST, signal.SIGCONT)
    return True
"""),
    "stopping the process group": (False, """
import os, signal
def attack():
    os.killpg(0, signal.SIGSTOP)
    return True
"""),
    "a signal to the owner of a pipe": (True, """
import fcntl, os
def attack():
    reader, _ = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, HOST)
    return True
"""),
    "tracing the parent": (False, """
import ctypes, os
def attack():
    attach = 16
    return ctypes.CDLL(None).ptrace(attach, os.getppid(), None, None) == 0
"""),
    "reading the parent's memory": (False, """
import os
def attack():
    open(f'/proc/{os.getppid()}/mem', 'rb')
    return True
"""),
    "raising the limits": (False, """
import resource
def attack():
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return True
"""),
    "new namespaces and mounts": (False, """
import ctypes
def attack():
    libc = ctypes.CDLL(None)
    done = [libc.unshare(0x10000000), libc.mount(b'none', b'/tmp', b'tmpfs', 0, None), libc.chroot(b'/')]
    return 0 in done
"""),
    "becoming root again": (False, """
import ctypes, os
def attack():
    before = os.getuid()
    if before == 0:
        return os.setgroups([1]) is None
    os.setuid(0)
    return True
"""),
    "the tests on standard input": (False, """
import os, sys
def attack():
    return bool(sys.stdin.read() or os.read(0, 1000))
"""),
    "the tests in memory": (False, """
import gc, sys
def attack():
    backwards = ')(kcatta tressa'
    frame, seen = sys._getframe(), []
    while frame:
        seen += [frame.f_globals, frame.f_locals]
        frame = frame.f_back
    return any(backwards in repr(item)[::-1] for item in [*gc.get_objects(), *seen])
"""),
}  # fmt: skip

# Only where Landlock is in force can files that others may read not be read.
READERS = {
    "reading a file": (True, """
def attack():
    return open('HOME/secret').read() == 'the secret of the host'
"""),
    "reading the host's environment": (True, """
def attack():
    return b'=' in open('/proc/HOST/environ', 'rb').read()
"""),
    "reading the accounts": (True, """
def attack():
    return 'root' in open('/etc/passwd').read()
"""),
    "listing the host's folder": (True, """
import os
def attack():
    return os.listdir('HOME') == ['secret']
"""),
}  # fmt: skip

FORGERIES = {
    "exiting early": "raise SystemExit(0)",
    "exiting early and hard": "import os\nos._exit(0)",
    "exiting in the call": "import os\ndef answer(x): os._exit(0)",
    "sys.exit in the call": "import sys\ndef answer(x): sys.exit(0)",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef answer(x): raise SystemExit(0)",
    "a printed pass": """
import sys
def answer(x):
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        print('{"passed": true, "reason": "passed", "layers": []}', file=stream, flush=True)
    sys.exit(0)
""",
    "a pass written to every descriptor": """
import os
def answer(x):
    for descriptor in range(64):
        try:
            os.write(descriptor, b'{"passed": true, "reason": "passed", "layers": []}\\n')
        except OSError:
            pass
    os._exit(0)
""",
    "answers written ahead": """
import os
for _ in range(100):
    os.write(4, b'{"value": true}\\n')
def answer(x): return True
""",
    "a flood of answers": """
import os
while True:
    os.write(4, b'{"value": 1}\\n' * 100)
""",
    "an answer without end": """
import os
while True:
    os.write(4, b'1' * 65536)
""",
    "garbage": "import os\nos.write(4, b'\\xff\\xfe{]\\n')\ndef answer(x): return 42",
    "nested garbage": "import os\nos.write(4, b'[' * 100000 + b'\\n')",
    "odd tags": """
import os
for reply in (b'{"type": "eval"}', b'{"object": [0]}', b'{"set": [[1]]}', b'{"fraction": [1, 0]}', b'{"what": 1}'):
    os.write(4, b'{"value": ' + reply + b'}\\n')
def answer(x): return 1
""",
    "closing all descriptors": "import os\ndef answer(x):\n    os.closerange(0, 64)\n    return 42",
    "equal to everything": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    __hash__ = object.__hash__
def answer(x): return Equal()
""",
    "a number equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __req__(self, other): return True
    __hash__ = int.__hash__
def answer(x): return Equal(7)
""",
    "a list equal to everything": """
class Equal(list):
    def __eq__(self, other): return True
def answer(x): return Equal()
""",
    "a liar about its class": """
class Liar:
    @property
    def __class__(self): return int
    def __eq__(self, other): return True
    def __int__(self): return 7
def answer(x): return Liar()
""",
    "replaced built-ins": """
import builtins
builtins.AssertionError = type('Never', (BaseException,), {})
for name in ('all', 'any', 'isinstance', 'len', 'abs', 'compile', 'exec', 'type'):
    setattr(builtins, name, lambda *a, **b: True)
def answer(x): return True
""",
    "a replaced checker": """
import sys
for module in list(sys.modules.values()):
    for name in ('pack', 'unpack', 'judge', 'serve', 'check', 'ask', 'receive', 'dumps', 'loads', 'write'):
        if hasattr(module, name):
            try:
                setattr(module, name, lambda *a, **b: True)
            except Exception:
                pass
def answer(x): return True
""",
    "changed constants": """
import ctypes, sys
def answer(x):
    address = id(42)
    ctypes.memmove(address, id(41), sys.getsizeof(42))
    return 41
""",
    "an assertion of its own": "def answer(x): raise AssertionError",
    "interrupting": "def answer(x): raise KeyboardInterrupt",
    "an object without a truth": "class O:\n    def __bool__(self): raise SystemExit(0)\ndef answer(x): return O()",
    "itself inside itself": "def answer(x):\n    y = []\n    y.append(y)\n    return y",
    "too much to send": "def answer(x): return 'x' * (1 << 25)",
    "too deep to send": "def answer(x):\n    y = []\n    for _ in range(10 ** 5): y = [y]\n    return y",
    "endless iterator": "import itertools\ndef answer(x): return itertools.count()",
    "a name for a module": "import sys\nanswer = sys",
    "a crash": "import ctypes\ndef answer(x): return ctypes.string_at(0)",
    "tracing": "import sys\nsys.settrace(lambda *_: sys.exit(0))\ndef answer(x): return 42",
}  # fmt: skip


def hostile(code: str, home: Path) -> str:
    return code.replace("HOME", str(home)).replace("HOST", str(os.getpid()))


@pytest.mark.parametrize("layers", [LAYERS, FILTERED], ids=["all layers", "filter only"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_contained(host, name, layers):
    code = hostile(ATTACKS[name][1], host)
    verdict = run(program(code, "assert attack()", names=("attack",)), BRIEF, layers)
    assert not verdict.passed
    assert verdict.reason not in {"the sandbox ended without a verdict", "the sandbox did not end in time"}


@pytest.mark.parametrize("name", READERS)
def test_files_cannot_be_read(host, name):
    if "files" not in isolation().layers:
        pytest.skip("Landlock is not in force here")
    code = hostile(READERS[name][1], host)
    assert not run(program(code, "assert attack()", names=("attack",)), QUICK).passed


@pytest.mark.parametrize("name", [name for name, (harmless, _) in (ATTACKS | READERS).items() if harmless])
def test_the_attacks_are_attacks(host, tmp_path, name):
    """Outside of the sandbox they succeed: none is refused because of a mistake in it."""
    code = hostile((ATTACKS | READERS)[name][1], host)
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-I", "-S", "-c", f"{code}\nassert attack() is True"]
    subprocess.run(command, cwd=work, check=True, timeout=20)
    (host / "written").unlink(missing_ok=True)


@pytest.mark.parametrize("name", FORGERIES)
def test_verdicts_cannot_be_forged(host, name):
    assert not run(program(FORGERIES[name], "assert answer(1) == 42", names=("answer",)), BRIEF).passed


def test_a_code_s_exception_does_not_end_a_loop_over_its_answers():
    code = "def answer(x): raise StopIteration"
    assert not run(program(code, "assert all(map(answer, [1, 2]))", names=("answer",)), QUICK).passed


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    code = "import os\ndef f(): return list(os.environ)"
    assert run(program(code, "assert set(f()) <= {'LD_LIBRARY_PATH', 'LC_CTYPE', *THREADS}",
                       setup="THREADS = 'OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS'"), QUICK).passed  # fmt: skip


def test_reasons_never_quote_the_code():
    code = "class Said(Exception): pass\ndef f(x): raise Said('words of the code')"
    verdict = run(program(code, "f(1)"), QUICK)
    assert verdict.reason == "the code raised an exception"


# ---------------------------------------------------------------- layers


def test_what_is_in_force_is_said():
    found = isolation()
    assert found.layers <= set(LAYERS)
    assert str(found).startswith("code sandbox: resource limits, and of 4 more layers: ")
    assert all(gap in str(found) for gap in found.gaps)


@pytest.mark.parametrize(
    ("layers", "gaps"),
    [
        (LAYERS, []),
        (("files", "system calls"), []),
        (("unprivileged", "namespaces", "files"), []),
        (("system calls",), ["read your processes' environment", "read your files"]),
        (("unprivileged", "namespaces"), ["change your files", "read your files"]),
        (
            ("unprivileged",),
            [
                "use the network",
                "signal or trace your processes",
                "read your processes' environment",
                "change your files",
                "read your files",
            ],
        ),
    ],
)
def test_gaps(layers, gaps):
    found = Isolation(frozenset(layers))
    assert found.gaps == gaps
    assert ("hostile code could" in str(found)) == bool(gaps)


def test_layers_that_are_refused_are_not_reported():
    verdict = run(program("def f(): return 1", "assert f()"), QUICK, FILTERED)
    assert verdict.passed and verdict.layers <= set(FILTERED)


def test_root_runs_nothing_where_processes_cannot_be_forbidden():
    verdict = run(program("def f(): return 1", "assert f()"), QUICK, layers=())
    if os.geteuid() == 0:
        assert (verdict.passed, verdict.reason) == (False, "refused: root, and no way to forbid new processes")
    else:
        assert verdict.passed and verdict.layers == {"unprivileged"}


@pytest.mark.parametrize("name", ["fork bomb", "thread bomb", "another program", "a daemon that survives"])
def test_without_any_layer_users_still_start_nothing(host, name):
    if os.geteuid() == 0:
        pytest.skip("root runs nothing without layers")
    code = hostile(ATTACKS[name][1], host)
    assert not run(program(code, "assert attack()", names=("attack",)), QUICK, layers=()).passed


def test_where_namespaces_are_refused_the_others_hold():
    """In a user namespace that may have no further ones."""
    script = (
        "from cdlm_jax.evaluation.code_sandbox import isolation, run\n"
        "from cdlm_jax.tasks.public import Program\n"
        "print(sorted(isolation().layers))"
    )
    shell = f'echo 0 > /proc/sys/user/max_user_namespaces && exec "{sys.executable}" -c "$0"'
    environment = os.environ | {"PYTHONPATH": str(Path(code_sandbox.__file__).parents[2])}
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "sh", "-c", shell, script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode:
        pytest.skip(f"cannot forbid namespaces here: {done.stderr[-200:]}")
    assert "namespaces" not in done.stdout and "system calls" in done.stdout


def test_a_broken_sandbox_is_an_error(monkeypatch, tmp_path):
    """Not a benchmark on which everything fails."""
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit")
    monkeypatch.setattr(code_sandbox, "_WORKER", broken)
    isolation.cache_clear()
    try:
        with pytest.raises(InputError, match="does not work on this machine: the sandbox ended without a verdict"):
            passes(program("def f(): return 1", "assert f()"))
    finally:
        isolation.cache_clear()


def test_limits_are_checked():
    for seconds in (0, -1, float("nan"), 1e9):
        with pytest.raises(InputError, match="seconds must be"):
            Limits(seconds=seconds)
    with pytest.raises(InputError, match="memory_bytes must be at least"):
        Limits(memory_bytes=1 << 20)


def test_threads_can_run_programs():
    found = {}

    def work(number):
        found[number] = passes(program(f"def f(): return {number}", "assert f() == 1"), QUICK)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: False, 1: True, 2: False, 3: False}
