"""Chat templates, rendered by a process of their own: one that hangs or eats memory costs that process, not ours.

Jinja cannot bound a template from inside: one expression may take hours in C (`9 ** 9 ** 9`), or all memory. The
system can. The process is started with the first rendering, serves all later ones, and ends with ours.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jinja2
import markupsafe

from cdlm_jax.config import InputError

SECONDS = 1.0  # of CPU time, for one rendering: a busy machine refuses nothing
PATIENCE = 30.0  # seconds of the clock, after which the process is given up
CHARACTERS = 1_000_000  # of a rendered prompt
MEMORY_BYTES = 1 << 29

_WORKER = Path(__file__).with_name("template_worker.py")


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a Jinja template, in the environment of Hugging Face's chat templates.

    variables: what JSON can say. InputError, in one line: the template fails, reaches for what is no business of its,
    or takes more than `SECONDS`, `CHARACTERS` or `MEMORY_BYTES`.
    """
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"chat messages must be what JSON can say: {error}") from error
    reply = _RENDERER.ask(request)
    if "text" in reply:
        return reply["text"]
    (found, why), *_ = reply.items()
    found = {"refused": "is refused", "failed": "failed"}[found]
    raise InputError(f"the chat template {found}: {' '.join(why.split())}")


class _Renderer:
    """The process, and one request at a time."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, request: str) -> dict[str, str]:
        """The process's reply, or in its stead what became of it."""
        with self._lock:
            asks, replies = _pipes(self._running())
            with contextlib.suppress(BrokenPipeError):
                asks.write(request.encode() + b"\n")
                asks.flush()
            answered = select.select([replies], [], [], PATIENCE)[0]
            if answered and (line := replies.readline()).endswith(b"\n"):
                return json.loads(line)
            status = self.end()
            if not answered or status == -signal.SIGPROF:
                return {"refused": f"it takes more than {SECONDS:g} s"}
            return {"refused": f"it ended the process that renders it (status {status})"}

    def _running(self) -> subprocess.Popen:
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            packages = {str(Path(str(package.__file__)).parent.parent) for package in (jinja2, markupsafe)}
            settings = {"seconds": SECONDS, "characters": CHARACTERS, "memory_bytes": MEMORY_BYTES}
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), json.dumps(settings | {"packages": sorted(packages)})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ},
                start_new_session=True,  # Ctrl-C is for us
            )
        return self._process

    def end(self) -> int | None:
        """Its exit status; the next request starts another process."""
        process, self._process = self._process, None
        if process is None:
            return None
        asks, replies = _pipes(process)
        with contextlib.suppress(BrokenPipeError):
            asks.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # it may be ending by itself: how is the reason
        process.kill()
        replies.close()
        return process.wait()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """Its standard input and output."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


_RENDERER = _Renderer()
atexit.register(_RENDERER.end)
