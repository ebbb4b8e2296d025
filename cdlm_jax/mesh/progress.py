"""How far a long piece of work is: a bar on a terminal, in a log a plain line at intervals; the first process shows it.

with progress("trajectories", total=512) as bar:
    bar.advance(64, "loss 0.1234")
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from cdlm_jax.mesh.distributed import is_main

FIRST, INTERVAL = 10.0, 30.0  # seconds to the first line of a log, and from line to line
SETTLED = 1.0  # seconds after the first advance from which the rate is counted: before it, programs are compiled

Item = TypeVar("Item")


def progress(
    label: str, total: int, *, done: int = 0, transient: bool = False, console: Console | None = None
) -> AbstractContextManager["Bar | Lines"]:
    """What to show of `total` items, `done` of them before this run; a context.

    transient: gone from a terminal at the end; a log that was over before its first line stays empty.
    console: where to; standard output of the first process by default.
    """
    console = console or Console(quiet=not is_main())
    animated = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
    shown: type[Bar | Lines] = Bar if animated else Lines
    return shown(label, total, done, transient, console)


def track(items: Iterable[Item], label: str, total: int, *, console: Console | None = None) -> Iterator[Item]:
    """The items, counted as they come."""
    with progress(label, total, console=console) as bar:
        for item in items:
            bar.advance()
            yield item


class Bar:
    """On a terminal."""

    def __init__(self, label: str, total: int, done: int, transient: bool, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        left = TimeRemainingColumn(elapsed_when_finished=True)
        status = TextColumn("{task.fields[status]}")
        self._rich = RichProgress(*columns, left, status, transient=transient, console=console)
        self._task = self._rich.add_task(label, total=total, completed=done, status="")

    def __enter__(self) -> "Bar":
        self._rich.start()
        return self

    def __exit__(self, *_) -> None:
        self._rich.stop()

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """So many more items are done; status: what else to show from now on, None leaves it."""
        fields: dict[str, Any] = {} if status is None else {"status": status}
        self._rich.update(self._task, advance=count, **fields)


class Lines:
    """In a log. A thread writes the lines, so that a step that takes minutes does not look like a dead process.

    clock: seconds; wait(seconds): sleeps, and says whether the work is over. Tests give their own.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int,
        transient: bool,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ):
        self._label, self._total, self._done, self._transient = label, total, done, transient
        self._console, self._clock = console, clock
        self._status, self._written, self._begin = "", False, clock()
        self._first: float | None = None  # when something was done for the first time
        self._settled = self._latest = (self._begin, done)  # (when, items done): the rate is counted between these
        self._over = threading.Event()
        self._writer = threading.Thread(target=self._write_on, args=(wait or self._over.wait,), daemon=True)

    def __enter__(self) -> "Lines":
        self._writer.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._writer.join()
        if self._written or (self._first is not None and not self._transient):
            self._write(f"{self._done:,} / {self._total:,} in {_duration(self._clock() - self._begin)}")

    def advance(self, count: int = 1, status: str | None = None) -> None:
        """So many more items are done; status: what else to show from now on, None leaves it."""
        self._done += count
        self._status = self._status if status is None else status
        now = self._clock()
        self._first = now if self._first is None else self._first
        self._latest = now, self._done
        if now - self._first < SETTLED:
            self._settled = self._latest

    def _write_on(self, wait: Callable[[float], bool]) -> None:
        pause = FIRST
        while not wait(pause):
            self._write(self._under_way())
            self._written, pause = True, INTERVAL

    def _write(self, text: str) -> None:
        words = " ".join(self._label.split()) + ": " + text + (f", {self._status}" if self._status else "")
        # The reader of the log has left (rich exits then, a console of commands/ raises): the work goes on.
        with contextlib.suppress(SystemExit, BrokenPipeError):
            self._console.out(words, highlight=False)

    def _under_way(self) -> str:
        (since, before), (until, done) = self._settled, self._latest
        share = f"{done:,} / {self._total:,} ({done / max(self._total, 1):.0%})"
        if done == before:
            return f"{share}, {_duration(self._clock() - self._begin)} so far"
        rate = (done - before) / (until - since)
        speed = f"{rate:,.1f} per second" if rate >= 1 else f"{1 / rate:,.1f} s each"
        return f"{share}, {speed}, {_duration((self._total - done) / rate)} left"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:02:05."""
    return str(timedelta(seconds=round(max(seconds, 0))))
