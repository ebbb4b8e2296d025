"""What a log says of long work, second by second of a clock that the test moves."""

import io
from collections.abc import Callable

import jax
import pytest
from rich.console import Console

from cdlm_jax.mesh import progress as module
from cdlm_jax.mesh.progress import Bar, Lines, progress, track


class Clock:
    """Each wait of the writer lasts as long as it asked for; meanwhile the work of `events` is done."""

    def __init__(self, *events: Callable[[], None]):
        self.now, self.events, self.waits = 0.0, list(events), []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        if not self.events:
            return True
        end = self.now + seconds
        self.events.pop(0)()
        self.now = end
        return False


def log(clock, total=100, *, done=0, transient=False, label="student"):
    """(lines, what they are written to)"""
    out = io.StringIO()
    console = Console(file=out, width=20)  # narrow: lines must not be wrapped
    return Lines(label, total, done, transient, console, clock, clock.wait), out


def test_the_lines_of_a_run():
    def compiled_at_last():
        clock.now += 29
        lines.advance(1, "loss 2.5000")

    def steps():
        for _ in range(10):
            clock.now += 2
            lines.advance(4, "loss 1.2500")

    clock = Clock(lambda: None, compiled_at_last, steps)
    lines, out = log(clock)
    with lines:
        lines._writer.join()
    assert clock.waits == [10, 30, 30, 30]
    assert out.getvalue().splitlines() == [
        "student: 0 / 100 (0%), 0:00:10 so far",
        "student: 1 / 100 (1%), 0:00:40 so far, loss 2.5000",
        "student: 41 / 100 (41%), 1.9 per second, 0:00:31 left, loss 1.2500",  # 40 steps in 21 s, compiling left out
        "student: 41 / 100 in 0:01:10, loss 1.2500",
    ]


def test_a_rate_below_one_and_a_run_that_continues():
    def slow():
        for _ in range(3):
            clock.now += 5
            lines.advance()

    clock = Clock(slow)
    lines, out = log(clock, 1_000, done=500)
    with lines:
        lines._writer.join()
    assert out.getvalue().splitlines()[0] == "student: 503 / 1,000 (50%), 5.0 s each, 0:41:25 left"


def test_answers_of_one_batch_are_no_rate():
    """They come together: how long a batch takes is known after the second one."""

    def batch():
        clock.now += 8
        for _ in range(16):
            lines.advance()

    clock = Clock(batch, batch)
    lines, out = log(clock)
    with lines:
        lines._writer.join()
    first, second, _ = out.getvalue().splitlines()
    assert first == "student: 16 / 100 (16%), 0:00:10 so far"
    assert second == "student: 32 / 100 (32%), 1.6 per second, 0:00:42 left"  # 16 in the 10 s between them


@pytest.mark.parametrize(
    ("transient", "done", "said"), [(False, 3, "student: 3 / 3 in 0:00:00\n"), (True, 3, ""), (False, 0, "")]
)
def test_short_work(transient, done, said):
    """One line at the end; none where nothing was left to do, or where the end does not matter."""
    lines, out = log(Clock(), 3, transient=transient)
    with lines:
        for _ in range(done):
            lines.advance()
    assert out.getvalue() == said


def test_a_failure_leaves_where_it_stood():
    lines, out = log(Clock(), 9)
    with pytest.raises(ZeroDivisionError), lines:
        lines.advance(2)
        raise ZeroDivisionError
    assert out.getvalue() == "student: 2 / 9 in 0:00:00\n"


def test_work_goes_on_when_the_reader_left(monkeypatch):
    lines, _ = log(Clock(), 2)

    def left(*_, **__):
        raise SystemExit(1)  # as rich does

    monkeypatch.setattr(lines._console, "out", left)
    with lines:
        lines.advance(2)


@pytest.mark.parametrize(
    ("terminal", "term", "kind"), [(True, "xterm", Bar), (True, "dumb", Lines), (False, "xterm", Lines)]
)
def test_a_bar_on_terminals_that_can_move_the_cursor(terminal, term, kind):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, _environ={"TERM": term})
    with progress("student", 2, console=console) as bar:
        bar.advance(2, "loss 1.0000")
    assert isinstance(bar, kind)
    assert "2" in out.getvalue() and "loss 1.0000" in out.getvalue()
    assert ("\x1b" in out.getvalue()) == (kind is Bar)


def test_track_counts_and_only_the_first_process_shows(monkeypatch, capsys):
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "letters: 3 / 3 in 0:00:00\n"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_first_line_soon_then_now_and_then():
    assert module.FIRST <= 10 and module.FIRST < module.INTERVAL <= 60
