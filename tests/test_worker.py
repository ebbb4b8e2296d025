"""A process behind a pipe: it answers, is replaced where it ended, and is never waited for longer than was said."""

import subprocess
import sys

import pytest

from cdlm_jax.worker import Gone, Worker

ECHO = """
import sys, time
for line in sys.stdin:
    word = line.strip()
    if word == "sleep": time.sleep(60)
    if word == "end": sys.exit(3)
    if word == "half": print("half", end="", flush=True); sys.exit(4)
    print("said", word, flush=True)
"""


def start(program: str = ECHO) -> subprocess.Popen:
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.fixture
def worker():
    worker = Worker(start)
    yield worker
    worker.close()


def test_one_process_answers_many_lines(worker):
    assert worker.ask(b"a\n", 30) == b"said a\n"
    process = worker.process
    assert worker.ask(b"b\n", 30) == b"said b\n" and worker.process is process


@pytest.mark.parametrize("line, late, status", [(b"end\n", False, 3), (b"half\n", False, 4), (b"sleep\n", True, -9)])
def test_what_became_of_it_is_said_and_another_takes_over(worker, line, late, status):
    assert worker.ask(b"a\n", 30) == b"said a\n"
    with pytest.raises(Gone) as gone:
        worker.ask(line, 0.2 if late else 30)
    assert (gone.value.late, gone.value.status, gone.value.starting) == (late, status, False)
    assert worker.ask(b"b\n", 30) == b"said b\n"


def test_one_that_was_killed_meanwhile_is_replaced(worker):
    worker.ask(b"a\n", 30)
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(b"b\n", 30) == b"said b\n"


def test_a_fresh_process_is_asked_the_first_question_first():
    worker = Worker(start, first=(b"hello\n", 30))
    assert worker.ask(b"a\n", 30) == b"said a\n"
    worker.close()
    broken = Worker(lambda: start("raise SystemExit"), first=(b"hello\n", 30))
    with pytest.raises(Gone) as gone:
        broken.ask(b"a\n", 30)
    assert gone.value.starting and broken.process is None


def test_an_interrupted_question_leaves_no_answer_behind(worker, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("select.select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        worker.ask(b"a\n", 30)
    assert worker.ask(b"b\n", 30) == b"said b\n"
