"""A process behind a pipe, for work that may hang or take all memory: it is asked a line and answers a line."""

import contextlib
import select
import subprocess
import threading
from collections.abc import Callable
from typing import IO


class Gone(Exception):
    """The process ended without an answer. late: it was ended, since its time was over; status: its exit status;
    starting: it had not begun to work."""

    def __init__(self, *, late: bool, status: int, starting: bool):
        super().__init__(f"status {status}" + (", late" if late else ""))
        self.late, self.status, self.starting = late, status, starting


class Worker:
    """Started when it is asked for the first time, and anew where it has ended. Threads wait for each other.

    start: gives the process, with pipes for its input and output. first: a question to a fresh process, and seconds for
    its answer, where it has much to import. process: the one at work, None if there is none.
    """

    def __init__(self, start: Callable[[], subprocess.Popen], first: tuple[bytes, float] | None = None):
        self._start, self._first = start, first
        self._lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The answer to a line (each with its line end), waited for so long. Gone if there is none."""
        with self._lock:
            try:
                if self.process is not None and self.process.poll() is not None:
                    self._end()
                if self.process is None:
                    self.process = self._start()
                    if self._first is not None:
                        self._exchange(self.process, *self._first, starting=True)
                return self._exchange(self.process, line, seconds)
            except BaseException:  # its answer must not be taken for that to the next question
                self._end()
                raise

    def close(self) -> None:
        """End the process, if there is one; the next question starts another."""
        with self._lock:
            self._end()

    def _exchange(self, process: subprocess.Popen, line: bytes, seconds: float, starting: bool = False) -> bytes:
        asks, answers = _pipes(process)
        with contextlib.suppress(BrokenPipeError):  # it is gone: how is asked below
            asks.write(line)
            asks.flush()
        in_time = bool(select.select([answers], [], [], seconds)[0])
        if in_time and (answer := answers.readline()).endswith(b"\n"):
            return answer
        raise Gone(late=not in_time, status=self._end(), starting=starting)

    def _end(self) -> int:
        """The exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        asks, answers = _pipes(process)
        with contextlib.suppress(BrokenPipeError):
            asks.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)  # it may be ending by itself: its status says why
        process.kill()
        answers.close()
        return process.wait()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout
