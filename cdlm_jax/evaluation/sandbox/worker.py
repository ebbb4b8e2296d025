"""Runs one program; started by `code_sandbox.py` as `python -I -S worker.py SETTINGS`.

Two processes. The *checker* runs the tests and holds the verdict; hostile code never runs in it. The *server* runs the
hostile code. It is forked off before the checker has read the program, so the tests were never in its memory, and it
is asked over a pipe to execute the code, to look up a name, to call a function. Answers arrive in the checker as plain
values, and it is the checker that compares them. Hostile code that ends its process, prints, or replaces functions can
only fail to answer.

    stdin   {"code": ..., "setup": ..., "tests": [...], "names": [...]}
    stdout  {"passed": bool, "reason": str, "layers": [...]}
"""

import contextlib
import json
import os
import signal
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement
from values import pack, unpack

del sys.path[0]

LARGEST_REPLY = 1 << 24  # bytes
STARTS_NO_PROCESS = {"unprivileged", "system calls"}  # one of them must be in force


def main() -> None:
    settings = json.loads(sys.argv[1])
    wanted, layers = settings["layers"], []
    sys.set_int_max_str_digits(0)
    confinement.limit(settings["cpu_seconds"], settings["memory_bytes"])
    if os.geteuid():
        layers.append("unprivileged")
    else:
        _add("unprivileged", wanted, layers, confinement.leave_root, settings["readable"])
    confinement.die_with_parent()
    if _add("namespaces", wanted, layers, confinement.new_namespaces) and (checker := os.fork()):
        os.waitpid(checker, 0)  # the first process of the new namespace: all others in it end with it
        os._exit(0)
    confinement.die_with_parent()
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    server_reads, requests = os.pipe()
    replies, server_writes = os.pipe()
    server = os.fork()
    if not server:
        for target, source in enumerate((nowhere, nowhere, nowhere, server_reads, server_writes)):
            os.dup2(source, target + 32)  # out of the way of the numbers to be given
        for target in range(5):
            os.dup2(target + 32, target)
        os.closerange(5, 64)
        serve(settings, layers)
        os._exit(0)
    confinement.hide_memory()
    os.close(server_reads)
    os.close(server_writes)
    channel = Channel(os.fdopen(requests, "wb"), os.fdopen(replies, "rb"))
    reason = judge(channel, settings["seconds"], layers)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    answer = {"passed": not reason, "reason": reason or "passed", "layers": layers}
    os.write(verdict, json.dumps(answer).encode())
    os._exit(0)


def _add(name: str, wanted: list[str], layers: list[str], apply, *arguments) -> bool:
    """Applies a layer if it is wanted and the system grants it."""
    if name in wanted:
        with contextlib.suppress(OSError):
            apply(*arguments)
            layers.append(name)
            return True
    return False


# ---------------------------------------------------------------- checker


class CodeError(Exception):
    """The code under test raised, or gave no proper answer."""


class TimeUp(BaseException):
    pass


class Channel:
    """The checker's end of the pipes."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies

    def receive(self):
        line = self.replies.readline(LARGEST_REPLY)
        if not line.endswith(b"\n"):
            raise CodeError("the code answered too much" if line else "the code ended its process")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CodeError("the code broke the protocol") from error

    def ask(self, *request):
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
        except OSError as error:
            raise CodeError("the code ended its process") from error
        reply = self.receive()
        if not isinstance(reply, dict) or "value" not in reply:
            raise CodeError("the code raised an exception")
        try:
            return unpack(reply["value"], lambda content: Remote(self, *content))
        except Exception as error:
            raise CodeError("the code broke the protocol") from error


class Remote:
    """A function, class or other object that lives in the server. It can be called and passed back."""

    __slots__ = ("channel", "index", "truth")

    def __init__(self, channel: Channel, index: int, truth: bool):
        self.channel, self.index, self.truth = channel, index, truth

    def __call__(self, *arguments, **named):
        return self.channel.ask("call", self.index, pack(arguments, _index), pack(named, _index))

    def __bool__(self) -> bool:
        return self.truth


def _index(value) -> int:
    if isinstance(value, Remote):
        return value.index
    raise TypeError(f"tests cannot pass a {type(value).__name__} to the code")


def judge(channel: Channel, seconds: float, layers: list[str]) -> str:
    """Why the program on stdin fails; empty if all of its tests ran to their end and held."""
    program = json.load(sys.stdin)

    def expire(*_):
        raise TimeUp

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        layers[:] = channel.receive()  # sent before hostile code runs
        if not STARTS_NO_PROCESS & set(layers):
            return "refused: root, and no way to forbid new processes"
        scope = {"__name__": "tests"}
        exec(compile(program["setup"], "<setup>", "exec"), scope)
        channel.ask("execute", program["code"])
        for name in program["names"]:
            scope[name] = channel.ask("get", name)
        for test in program["tests"]:
            exec(compile(test, "<test>", "exec"), scope)
    except TimeUp:
        return f"not done after {seconds:g} s"
    except CodeError as error:
        return str(error)
    except AssertionError:
        return "a test failed"
    except BaseException as error:
        return f"a test raised {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


# ---------------------------------------------------------------- server


def serve(settings: dict, layers: list[str]) -> None:
    """Gives up what can be given up, then does what the checker asks."""
    requests, replies = os.fdopen(3, "rb"), os.fdopen(4, "wb")
    confinement.die_with_parent()
    confinement.forbid_processes()
    confinement.drop_capabilities()
    _add("files", settings["layers"], layers, confinement.restrict_files, settings["readable"])
    _add("system calls", settings["layers"], layers, confinement.filter_system_calls)
    sys.path += settings["packages"]
    module = sys.modules["answer"] = types.ModuleType("answer")
    objects = []

    def refer(value):
        objects.append(value)
        return [len(objects) - 1, bool(value)]

    def perform(action, subject, arguments=(), named=()):
        if action == "execute":
            exec(compile(subject, "<answer>", "exec"), module.__dict__)
            return None
        if action == "get":
            return getattr(module, subject)
        look_up = objects.__getitem__
        return objects[subject](*unpack(arguments, look_up), **unpack(named, look_up))

    replies.write(json.dumps(layers).encode() + b"\n")
    replies.flush()
    for line in requests:
        try:
            reply = {"value": pack(perform(*json.loads(line)), refer)}
        except BaseException:
            reply = {}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
