"""Chat templates, rendered by a process of their own: one that hangs or eats memory costs that process, not ours.

Jinja cannot bound a template from inside: one expression may take hours in C (`9 ** 9 ** 9`), or all memory. The
system can. The process is started with the first rendering, serves all later ones, and ends with ours.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from cdlm_jax.config import InputError
from cdlm_jax.worker import Gone, Worker

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
    reply = _reply(template, request)
    if "text" in reply:
        return reply["text"]
    (found, why), *_ = reply.items()
    found = {"refused": "is refused", "failed": "failed"}[found]
    raise InputError(f"the chat template {found}: {' '.join(why.split())}")


def _reply(template: str, request: str) -> dict[str, str]:
    """The process's reply, or in its stead what became of it. A template that once took too long is not tried again:
    a file of prompts would take as long for each."""
    too_slow = {"refused": f"it takes more than {SECONDS:g} s"}
    if template in _TOO_SLOW:
        return too_slow
    try:
        return json.loads(_RENDERER.ask(request.encode() + b"\n", PATIENCE))
    except Gone as gone:
        if gone.status == -signal.SIGPROF:
            _TOO_SLOW.add(template)
        if gone.late or gone.status == -signal.SIGPROF:
            return too_slow
        return {"refused": f"it ended the process that renders it (status {gone.status})"}


def _start() -> subprocess.Popen:
    packages = {str(Path(str(package.__file__)).parent.parent) for package in (jinja2, markupsafe)}
    settings = {"seconds": SECONDS, "characters": CHARACTERS, "memory_bytes": MEMORY_BYTES}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_WORKER), json.dumps(settings | {"packages": sorted(packages)})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ},
        start_new_session=True,  # Ctrl-C is for us
    )


_TOO_SLOW: set[str] = set()
_RENDERER = Worker(_start)
atexit.register(_RENDERER.close)
