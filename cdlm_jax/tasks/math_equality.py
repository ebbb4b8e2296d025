"""Whether two LaTeX answers are equal: as normalized text, else by math-verify (the optional extra `eval`)."""

import atexit
import contextlib
import importlib.util
import json
import re
import select
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from cdlm_jax.config import InputError

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
        self._lock = threading.Lock()
        self._worker: subprocess.Popen | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """False also where comparing takes too long or breaks down, and for an answer that is too long to be one."""
        if len(answer) > LONGEST_ANSWER:
            return False
        with self._lock:
            try:
                worker = self._started()
                assert worker.stdin is not None  # a pipe, as `_started` asks
                worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                return self._line(worker, self.seconds) == b"true\n"
            except OSError:  # it is late, or it died
                self.close()
                return False
            except BaseException:  # its answer must not be taken for that to the next question
                self.close()
                raise

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            with contextlib.suppress(OSError):
                self._worker.communicate()
            self._worker = None

    def _started(self) -> subprocess.Popen:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
            try:
                self._line(self._worker, STARTUP_SECONDS)
            except OSError as error:
                raise InputError(f"math-verify is installed but does not start within {STARTUP_SECONDS:g} s") from error
        return self._worker

    @staticmethod
    def _line(worker: subprocess.Popen, seconds: float) -> bytes:
        assert worker.stdout is not None  # a pipe, as `_started` asks
        if not select.select([worker.stdout], [], [], seconds)[0]:
            raise TimeoutError
        if line := worker.stdout.readline():
            return line
        raise BrokenPipeError


@cache
def judge() -> Judge:
    """The one of this process. InputError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError('comparing mathematical answers needs math-verify: pip install "cdlm_jax[eval]"')
    found = Judge()
    atexit.register(found.close)
    return found
