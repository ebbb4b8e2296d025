"""Whether two LaTeX answers are equal: as normalized text, else by math-verify (the optional extra `eval`)."""

import atexit
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from cdlm_jax.config import InputError
from cdlm_jax.worker import Gone, Worker

STARTUP_SECONDS = 60.0
LONGEST_ANSWER = 2000  # characters
_WORKER = Path(__file__).parent / "math_worker.py"


def normalized(latex: str) -> str:
    """Without what does not change an answer: spaces, sizes of braces, text commands, a final period, currency."""
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad| )", "", latex.strip().strip("$"))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^(?:\\circ|\{\\circ\})|\\[$%]|[$%~\s]", "", text)
    return text.removesuffix(".")


class Judge:
    """math-verify behind a pipe. Safe to use from any thread; never waits longer than `seconds` for one answer."""

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self.worker = Worker(_start, first=(_question("1", "1"), STARTUP_SECONDS))

    def equal(self, gold: str, answer: str) -> bool:
        """False also where comparing takes too long or breaks down, and for an answer that is too long to be one."""
        if len(answer) > LONGEST_ANSWER:
            return False
        try:
            return self.worker.ask(_question(gold, answer), self.seconds) == b"true\n"
        except Gone as gone:
            if gone.starting:
                raise InputError(f"math-verify is installed but does not start within {STARTUP_SECONDS:g} s") from gone
            return False

    def close(self) -> None:
        self.worker.close()


def _question(gold: str, answer: str) -> bytes:
    return json.dumps([gold, answer]).encode() + b"\n"


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


@cache
def judge() -> Judge:
    """The one of this process. InputError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError('comparing mathematical answers needs math-verify: pip install "cdlm_jax[eval]"')
    found = Judge()
    atexit.register(found.close)
    return found
